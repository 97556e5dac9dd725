"""Packaging.  The core is light; each extra has one job."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r"__version__ = '([^']+)'", (ROOT / 'llmjax/__init__.py').read_text())[1]

setuptools.setup(
    name='llmjax',
    version=VERSION,
    description='Training, fine-tuning, RL and evaluation of language models in JAX, on any device mesh.',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=setuptools.find_packages(include=['llmjax', 'llmjax.*']),
    package_data={'llmjax.report': ['templates/*']},
    entry_points={'console_scripts': ['llmjax=llmjax.main:main']},
    install_requires=[
        # Arrays, compiler, meshes.  0.10 is the newest for Python 3.11, 0.12 for 3.12 and later.
        'jax>=0.10',
        'flax>=0.12.8',  # Layers.
        'optax>=0.2.8',  # Optimizers and schedules.
        'orbax-checkpoint>=0.12',  # Checkpoints.
        'tensorflow-datasets>=4.9.10',  # Documents in ArrayRecord files; TensorFlow is not needed.
        'importlib_resources',  # Imported by TensorFlow Datasets, which does not declare it.
        'array-record>=0.8',
        'grain>=0.2.18',  # Shuffling, mixing, data loader processes.
        'sentencepiece>=0.2.1',  # Tokenizer.
        'zstandard',  # .zst files.
        'safetensors>=0.8',  # Hugging Face peft adapters; bfloat16 in NumPy.
        'ml-collections>=1.1',  # Config objects of recipes.
        'absl-py>=2.1',  # Command-line flags.
        'pyyaml>=6.0.1',  # Kubernetes manifests.
        'jinja2>=3.1.6',  # Chat templates; earlier sandboxes can be escaped.
        'tensorboardX>=2.6',  # TensorBoard events without TensorFlow.
    ],
    extras_require={
        'tpu': ['jax[tpu]>=0.10'],
        'cuda': ['jax[cuda13]>=0.10'],
        'beam': ['apache-beam>=2.77'],  # Prepare data on many machines.
        'wandb': ['wandb'],
        'mlflow': ['mlflow'],
        'test': ['pytest', 'pytest-xdist', 'hypothesis', 'import-linter'],
    },
)
