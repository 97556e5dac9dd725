"""Packaging.  The core is light; each extra has one job."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r"__version__ = '([^']+)'", (ROOT / 'llmjax/__init__.py').read_text())[1]

setuptools.setup(
    name='llmjax',
    version=VERSION,
    description='The whole life of a language model in JAX, on any device mesh.',
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
        'tensorflow-datasets>=4.9.10',  # Documents, as ArrayRecord; TensorFlow is not needed.
        'importlib_resources',  # TensorFlow Datasets imports it without asking for it.
        'array-record>=0.8',
        'grain>=0.2.18',  # Order, shuffling, mixing, workers.
        'sentencepiece>=0.2.1',  # Tokenizer.
        'zstandard',  # Reading .zst text.
        'safetensors>=0.8',  # Adapters of peft; bfloat16 in NumPy.
        'ml-collections>=1.1',  # Recipes.
        'absl-py>=2.1',  # Flags.
        'pyyaml>=6.0.1',  # Manifests of Kubernetes.
        'jinja2>=3.1.6',  # Chat templates; its sandbox before that could be left.
        'tensorboardX>=2.6',  # TensorBoard events without TensorFlow.
    ],
    extras_require={
        'tpu': ['jax[tpu]>=0.10'],
        'cuda': ['jax[cuda13]>=0.10'],
        'beam': ['apache-beam>=2.77'],  # Prepare a large corpus on many machines.
        'wandb': ['wandb'],
        'mlflow': ['mlflow'],
        'test': ['pytest', 'pytest-xdist', 'hypothesis', 'import-linter'],
    },
)
