"""Old names of config fields, values, flags and commands, with the new ones.

Using an old name is an error that names the new one; `migrate` converts the config of an old run.
"""

FIELDS = {
    'train.accumulation': 'train.gradient_accumulation_steps',
    'data.long': 'data.overflow',
    'optimizer.rates': 'optimizer.lr_multipliers',
    'policy.decay': 'policy.gae_lambda',
    'policy.discount': 'policy.gamma',
    'policy.average': 'policy.loss_aggregation',
    'policy.ratio': 'policy.importance_sampling',
    'policy.clip_ratio': 'policy.dual_clip',
    'policy.scale': 'policy.advantage_normalization',
    'rl.group': 'rl.num_generations',
    'rl.prompts': 'rl.prompts_per_iteration',
    'rl.rounds': 'rl.max_resample_rounds',
    'rl.tolerance': 'rl.logprob_tolerance',
    'rl.mask_truncated': 'rl.mask_truncated_completions',
    'policy.advantages': 'policy.advantage_estimator',
    'policy.temperatures': 'policy.sapo_temperatures',
    'policy.gammas': 'policy.vespo_k_lambda',
    'preference.length_weight': 'preference.ld_alpha',
    'preference.margin': 'preference.simpo_gamma',
    'distill.on_policy': 'distill.on_policy_fraction',
    'reward.centring': 'reward.center_rewards_coef',
    'evaluate.by_source': 'evaluate.per_source',
    'evaluate.also': 'evaluate.extra_sources',
}

# {field or flag: {old value: new value}}.
VALUES = {
    'rl.rewards': {'maths': 'math'},
    'reward': {'maths': 'math'},
    'records': {'pairs': 'preference', 'steps': 'stepwise'},
    'reward.scores': {'answers': 'completions'},
    'policy.advantage_estimator': {'mean': 'group_mean', 'others': 'leave_one_out'},
    'preference.reference': {'adapters_off': 'disable_adapter'},
    'distill.init': {'spread': 'evenly_spaced'},
}

FLAGS = {
    'most': 'max_compiles',
    'rows_per_chip': 'sequences_per_chip',
}

COMMANDS = {
    'checkpoint seal': 'checkpoint sign',
}


def renamed_value(field, value):
  """Return the new name of a value of a field that was renamed, or None."""
  return VALUES.get(field, {}).get(value) if isinstance(value, str) else None


def migrate(values):
  """Rename the fields and values of a config, nested dicts.  Returns (the new config, {old name: new name})."""
  values, done = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}, {}
  for old, new in FIELDS.items():
    group, old_field = old.split('.')
    fields = values.get(group)
    if isinstance(fields, dict) and old_field in fields:
      fields[new.split('.')[1]] = fields.pop(old_field)
      done[old] = new
  for name, table in VALUES.items():
    group, _, field = name.rpartition('.')
    fields = values.get(group, {}) if group else values
    value = fields.get(field) if isinstance(fields, dict) else None
    if isinstance(value, str) and value in table:
      fields[field] = table[value]
      done[f'{name}={value}'] = f'{name}={table[value]}'
    elif isinstance(value, dict) and set(value) & set(table):
      fields[field] = {table.get(k, k): v for k, v in value.items()}
      done |= {f'{name}.{k}': f'{name}.{table[k]}' for k in value if k in table}
  return values, done
