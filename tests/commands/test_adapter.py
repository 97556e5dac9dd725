"""Adapters in the training loop, in checkpoints, and in the format of peft."""

import json
import shutil

import jax
import numpy as np
import pytest

from llmjax.adapt.spec import AdapterSpec
from llmjax.checkpoint import manifest
from llmjax.checkpoint.load import load_params
from llmjax.config import ConfigError, build
from llmjax.evaluate.spec import EvaluateSpec
from llmjax.interop import peft, safetensors
from llmjax.model.spec import ModelSpec
from llmjax.parallel.mesh import make_mesh
from llmjax.run import loop as harness
from llmjax.run import timer
from llmjax.run.goodput import Goodput
from llmjax.run.spec import PretrainSpec
from llmjax.run.workdir import claim_workdir
from llmjax.run.writers import LogsSpec
from llmjax.train import objectives
from llmjax.train.spec import OptimizerSpec, TrainSpec
from tests.helpers import call_and_read

MODEL = ModelSpec(num_layers=2, d_model=16, num_heads=2, mlp_dim=24, vocab_size=32, tie_embeddings=True)
ADAPTER = AdapterSpec(kind='dora', rank=2, quantize='nf4')


class Batches:
  """Batches that are a function of their number."""

  fingerprint = 'of no text'
  state = 0

  def __next__(self):
    self.state += 1
    tokens = np.random.default_rng(self.state).integers(0, 32, (4, 9)).astype(np.int32)
    ones = np.ones((4, 8), np.int32)
    return {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'segment_ids': ones,
            'positions': ones * np.arange(8, dtype=np.int32), 'loss_mask': ones.astype(np.float32)}

  def restore(self, state):
    self.state = state

  def close(self):
    pass


def train(workdir, steps, adapter=None, source=''):
  spec = PretrainSpec(
      model=MODEL, train=TrainSpec(steps=steps, batch_size=4, checkpoint_every=2, compute_dtype='float32',
                                   init_from=str(source)),
      optimizer=OptimizerSpec(lr=0.01, schedule='constant'), logs=LogsSpec(writers=()), evaluate=EvaluateSpec(),
      adapter=adapter or AdapterSpec())
  seen = []
  evaluate = lambda params, frozen: seen.append(jax.tree.structure(params)) or {'loss': 1.0}
  mesh = make_mesh(spec.mesh, jax.devices()[:1])
  claim_workdir(workdir, spec)
  job = harness.Job(spec=spec, mesh=mesh, batches=Batches(), goodput=Goodput(workdir), sample=None,
                    loss_fn=objectives.next_token(objectives.make_model(MODEL, spec.train, 'cpu')),
                    evaluators={'validation': evaluate})
  with jax.set_mesh(mesh):
    return harness.train(job, workdir)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """A base of 2 steps, and an adapter on it of 4."""
  folder = tmp_path_factory.mktemp('runs')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(timer.chips, 'peak_flops', lambda device: None)
    assert train(folder / 'base', 2) == 0
    assert train(folder / 'lora', 4, ADAPTER, folder / 'base') == 0
    yield folder


@pytest.mark.slow
def test_a_run_resumes_bit_exactly_and_only_on_its_base(runs, tmp_path, capsys):
  shutil.copytree(runs / 'lora', tmp_path / 'lora')
  shutil.rmtree(tmp_path / 'lora/checkpoints/4')
  assert train(tmp_path / 'lora', 4, ADAPTER, runs / 'base') == 0
  capsys.readouterr()
  status, out, _ = call_and_read(capsys, 'checkpoint', 'diff', '4', '4', f'--workdir={runs}/lora',
                                 f'--other={tmp_path}/lora')
  assert status == 0 and 'are equal to the bit' in out
  size = lambda run, step: manifest.read_manifest(run / f'checkpoints/{step}').size
  assert 'embed' not in str(list(manifest.read_manifest(runs / 'lora/checkpoints/4').files))
  assert size(runs / 'lora', 4) > 0
  # Another base in the same place, and then none.
  shutil.rmtree(tmp_path / 'lora/checkpoints/4')
  kept = runs / 'kept'
  (runs / 'base').rename(kept)
  try:
    with pytest.raises(ConfigError, match='base of this adapter, .*base/checkpoints/2, is gone; put it back'):
      train(tmp_path / 'lora', 4, ADAPTER, runs / 'base')
    assert train(tmp_path / 'lora', 2, ADAPTER, kept) == 0  # Nothing to do.
    assert train(runs / 'base', 4) == 0
    shutil.rmtree(runs / 'base/checkpoints/2')
    (runs / 'base/checkpoints/4').rename(runs / 'base/checkpoints/2')
    with pytest.raises(ConfigError, match='is not'):
      train(tmp_path / 'lora', 4, ADAPTER, runs / 'base')
  finally:
    shutil.rmtree(runs / 'base', ignore_errors=True)
    kept.rename(runs / 'base')


@pytest.mark.slow
def test_merge_export_import_show(runs, tmp_path, capsys):
  whole, _, _, _ = load_params(runs / 'lora')
  assert call_and_read(capsys, 'adapter', 'merge', f'--workdir={runs}/lora', f'--output={tmp_path}/merged')[0] == 0
  merged, _, settings, step = load_params(tmp_path / 'merged')
  assert step == 4 and 'adapter' not in settings
  jax.tree.map(np.testing.assert_array_equal, merged, whole)
  base, _, _, _ = load_params(runs / 'base')
  np.testing.assert_array_equal(merged['embed']['table'], base['embed']['table'])
  assert np.any(merged['blocks']['mlp']['up'] != base['blocks']['mlp']['up'])
  assert call_and_read(capsys, 'adapter', 'export', f'--workdir={runs}/lora', f'--output={tmp_path}/peft')[0] == 0
  found = json.loads((tmp_path / 'peft/adapter_config.json').read_text())
  assert (found['r'], found['lora_alpha'], found['use_dora']) == (2, 32, True)
  arrays = safetensors.read(tmp_path / 'peft/adapter_model.safetensors')
  assert arrays['base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight'].shape == (2, 16)
  assert arrays['base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector'].shape == (24,)
  assert len(arrays) == 2 * 7 * 3
  flags = f'--peft={tmp_path}/peft', f'--init-from={runs}/base', f'--workdir={tmp_path}/imported'
  assert call_and_read(capsys, 'adapter', 'import', *flags)[0] == 0
  status, out, _ = call_and_read(capsys, 'adapter', 'show', f'--workdir={tmp_path}/imported')
  assert status == 0 and 'dora, rank 2, alpha 32' in out and 'blocks/attention/out/a' in out
  again, spec = peft.load(tmp_path / 'peft', base)
  peft.export(tmp_path / 'again', again, spec)
  same = safetensors.read(tmp_path / 'again/adapter_model.safetensors')
  assert same.keys() == arrays.keys() and all(np.array_equal(same[k], arrays[k]) for k in arrays)
  status, _, err = call_and_read(capsys, 'adapter', 'import', *flags)
  assert status == 2 and 'exists already' in err
  assert call_and_read(capsys, 'adapter', 'merge', f'--workdir={runs}/base', f'--output={tmp_path}/x')[0] == 2


def test_other_files_than_peft_s_are_refused(tmp_path):
  shapes = {'head': {'kernel': np.zeros((4, 6))}}
  (tmp_path / 'adapter_config.json').write_text(json.dumps({'peft_type': 'IA3', 'r': 2, 'lora_alpha': 2}))
  with pytest.raises(ConfigError, match="peft_type='IA3' has no counterpart"):
    peft.load(tmp_path, shapes)
  (tmp_path / 'adapter_config.json').write_text(json.dumps({'r': 2, 'lora_alpha': 2}))
  safetensors.write(tmp_path / 'adapter_model.safetensors', {
      'base_model.model.lm_head.lora_A.weight': np.zeros((2, 5), np.float32), 'what': np.zeros(3, np.float32)})
  with pytest.raises(ConfigError) as e:
    peft.load(tmp_path, shapes)
  assert len(e.value.problems) == 2 and 'such as what [3]' in str(e.value)
  data = (tmp_path / 'adapter_model.safetensors').read_bytes()
  (tmp_path / 'adapter_model.safetensors').write_bytes(data[:-4])
  with pytest.raises(ConfigError, match='adapter_model.safetensors is no safetensors file'):
    peft.load(tmp_path, shapes)


# adapter_config.json of a plain LoRA as peft 0.21 writes it.
PEFT_CONFIG = {
    'alora_invocation_tokens': None, 'alpha_pattern': {}, 'arrow_config': None, 'auto_mapping': None,
    'base_model_name_or_path': 'org/model', 'bias': 'none', 'corda_config': None, 'ensure_weight_tying': False,
    'eva_config': None, 'exclude_modules': None, 'fan_in_fan_out': False, 'inference_mode': True,
    'init_lora_weights': True, 'kasa_config': None, 'layer_replication': None, 'layers_pattern': None,
    'layers_to_transform': None, 'loftq_config': {}, 'lora_alpha': 4, 'lora_bias': False, 'lora_dropout': 0.05,
    'lora_ga_config': None, 'megatron_config': None, 'megatron_core': 'megatron.core', 'modules_to_save': None,
    'monteclora_config': None, 'peft_type': 'LORA', 'peft_version': '0.21.2', 'qalora_group_size': 16, 'r': 2,
    'rank_pattern': {}, 'revision': None, 'target_modules': ['lm_head'], 'target_parameters': None,
    'task_type': 'CAUSAL_LM', 'trainable_token_indices': None, 'use_bdlora': None, 'use_dora': False,
    'use_qalora': False, 'use_rslora': False, 'velora_config': None}


@pytest.fixture
def load_peft(tmp_path):
  """A function that loads an adapter of the head with given fields of its config."""
  safetensors.write(tmp_path / 'adapter_model.safetensors', {
      'base_model.model.lm_head.lora_A.weight': np.ones((2, 4), np.float32),
      'base_model.model.lm_head.lora_B.weight': np.ones((6, 2), np.float32)})

  def load(**fields):
    (tmp_path / 'adapter_config.json').write_text(json.dumps({**PEFT_CONFIG, **fields}))
    return peft.load(tmp_path, {'head': {'kernel': np.zeros((4, 6))}})

  return load


@pytest.mark.parametrize('fields', [
    {}, {'init_lora_weights': 'gaussian'}, {'init_lora_weights': False}, {'use_rslora': True}, {'task_type': None},
    {'target_modules': 'all-linear'}, {'layers_to_transform': []}, {'a_field_of_2030': None}])
def test_a_plain_lora_of_peft_is_read(load_peft, fields):
  adapter, spec = load_peft(**fields)
  assert adapter['head']['kernel']['a'].shape == (4, 2)
  assert (spec.rank, spec.alpha, spec.dropout) == (2, 4, 0.05)
  assert spec.kind == ('rslora' if fields.get('use_rslora') else 'lora')


@pytest.mark.parametrize('fields', [
    *({'init_lora_weights': name} for name in ('pissa', 'pissa_niter_16', 'olora', 'eva', 'corda', 'loftq', 'lora_ga',
                                               'mica', 'orthogonal', 'PiSSA', None, 1)),
    *({'bias': name} for name in ('all', 'lora_only', True)), {'task_type': 'SEQ_CLS'}, {'peft_type': 'ADALORA'},
    {'use_qalora': True}, {'trainable_token_indices': [1, 2]}, {'trainable_token_indices': {'embed_tokens': [1]}},
    {'modules_to_save': ['lm_head']}, {'layers_to_transform': [0]}, {'layers_to_transform': 1}, {'lora_bias': True},
    {'fan_in_fan_out': True}, {'alpha_pattern': {'q_proj': 8}}, {'rank_pattern': {'q_proj': 8}},
    {'layer_replication': [[0, 4], [2, 5]]}, {'megatron_config': {'x': 1}}, {'loftq_config': {'loftq_bits': 4}},
    {'alora_invocation_tokens': [5]}, {'target_parameters': ['mlp.up']}, {'arrow_config': {'top_k': 2}},
    {'ensure_weight_tying': True}, {'use_dora': 'yes'}, {'a_field_of_2030': 0.5}])
def test_adapters_of_other_methods_are_refused(load_peft, fields):
  (name, value), = fields.items()
  with pytest.raises(ConfigError) as e:
    load_peft(**fields)
  assert len(e.value.problems) == 1 and e.value.problems[0].endswith(f': {name}={value!r} has no counterpart here')


def test_all_problems_of_a_peft_config_are_reported_at_once(load_peft):
  with pytest.raises(ConfigError) as e:
    load_peft(r=0, lora_alpha='8', lora_dropout=1.5, use_rslora=True, use_dora=True, init_lora_weights='pissa')
  assert [line.partition('adapter_config.json: ')[2].partition('=')[0].split()[0] for line in e.value.problems] == [
      'r', 'lora_alpha', 'lora_dropout', 'init_lora_weights', 'use_rslora']


def test_invalid_combinations_are_reported_at_once():
  with pytest.raises(ConfigError) as e:
    build(PretrainSpec, {'adapter': {'kind': 'lora'}, 'pipeline': {'schedule': '1f1b'}})
  assert 'train.init_from is missing' in str(e.value) and 'write pipeline.schedule=gpipe' in str(e.value)
  with pytest.raises(ConfigError, match='quantize=nf4 .* set adapter.kind'):
    build(PretrainSpec, {'adapter': {'quantize': 'nf4'}})
