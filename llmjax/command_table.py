"""The commands of the command line.  Their modules are imported when they run."""

import dataclasses
import importlib


@dataclasses.dataclass(frozen=True)
class Command:
  """A command.  Classes are written as `module:Class`.

  summary: what it does, for `--help`.  module: has the function `run(spec, options)`.  options: dataclass of its flags.
  spec: dataclass that `--config` fills, or None if it takes no recipe.  example: a command line.  launches: it runs
  another command, given after `--`; `run` receives that command's arguments in place of the spec.
  """

  summary: str
  module: str
  options: str
  spec: str | None = None
  example: str = ''
  launches: bool = False


COMMANDS = {
    'prepare': Command(
        'prepare training data: read text, train a tokenizer, tokenize', 'llmjax.commands.prepare',
        'llmjax.data.spec:PrepareOptions', 'llmjax.data.spec:PrepareSpec',
        'llmjax prepare --config=configs/data/python_docs.py'),
    'pretrain': Command(
        'pretrain a language model, or resume a run', 'llmjax.loops.pretrain',
        'llmjax.run.spec:PretrainOptions', 'llmjax.run.spec:PretrainSpec',
        'llmjax pretrain --config=configs/pretrain/quickstart.py --workdir=runs/quickstart'),
    'finetune': Command(
        'fine-tune a model on conversations, text or preferences', 'llmjax.loops.finetune',
        'llmjax.run.spec:PretrainOptions', 'llmjax.run.spec:FinetuneSpec',
        'llmjax finetune --config=configs/finetune/chat.py --workdir=runs/chat'),
    'reward': Command(
        'train a reward model on preferences or step labels', 'llmjax.loops.reward',
        'llmjax.run.spec:PretrainOptions', 'llmjax.run.spec:RewardSpec',
        'llmjax reward --config=configs/reward/preference.py --workdir=runs/reward'),
    'rl': Command(
        'train a model by reinforcement learning (GRPO, PPO and others)', 'llmjax.loops.rl',
        'llmjax.run.spec:PretrainOptions', 'llmjax.run.spec:RlCommandSpec',
        'llmjax rl --config=configs/rl/sums_grpo.py --workdir=runs/rl'),
    'preview': Command(
        'show training sequences as text, with the trained tokens marked', 'llmjax.commands.preview',
        'llmjax.commands.spec:PreviewOptions', 'llmjax.commands.spec:PreviewSpec',
        'llmjax preview --config=configs/finetune/chat.py --rows=3'),
    'feedback revise': Command(
        'have a model critique and revise completions by written principles', 'llmjax.commands.feedback',
        'llmjax.post.ai_feedback:ReviseOptions', None,
        'llmjax feedback revise --workdir=runs/chat --principles=configs/feedback/principles.toml '
        '--prompts=prompts.jsonl --output=data/revised.jsonl'),
    'feedback prefer': Command(
        'have a model compare completions by written principles', 'llmjax.commands.feedback',
        'llmjax.post.ai_feedback:PreferOptions', None,
        'llmjax feedback prefer --workdir=runs/critic --policy=runs/chat --principles=configs/feedback/principles.toml '
        '--prompts=prompts.jsonl --output=data/preferences.jsonl'),
    'evaluate': Command(
        'evaluate a run on held-out data: perplexity, bits per byte, completions', 'llmjax.loops.evaluate',
        'llmjax.evaluate.spec:EvaluateOptions', None,
        'llmjax evaluate --workdir=runs/quickstart'),
    'generate': Command(
        'generate text from a run', 'llmjax.loops.generate',
        'llmjax.generate.spec:GenerateOptions', None,
        "llmjax generate --workdir=runs/quickstart --prompt='def '"),
    'report': Command(
        'write the report of a run, or a comparison of several runs', 'llmjax.commands.report',
        'llmjax.evaluate.spec:ReportOptions', None,
        'llmjax report --workdir=runs/quickstart --compare=runs/chat,runs/rl'),
    'mesh': Command(
        'show how a recipe is sharded: mesh, parameters, memory, collectives', 'llmjax.commands.mesh',
        'llmjax.plan.spec:MeshOptions', 'llmjax.commands.spec:LayoutSpec',
        'llmjax mesh --config=configs/pretrain/quickstart.py --config.mesh.fsdp=4 --devices=8'),
    'plan': Command(
        'predict memory, speed and cost of a run on TPUs from its compiled program; needs no TPU',
        'llmjax.commands.plan',
        'llmjax.plan.spec:PlanOptions', 'llmjax.commands.spec:PlanSpec',
        'llmjax plan --config=configs/pretrain/llama2_7b.py --topology=v5p:4x4x4'),
    'checkpoint ls': Command(
        "list a run's checkpoints: size, time, metric, verified or damaged", 'llmjax.commands.checkpoint',
        'llmjax.checkpoint.spec:ListOptions', None, 'llmjax checkpoint ls --workdir=runs/quickstart'),
    'checkpoint verify': Command(
        'verify the checksums of every file of the checkpoints', 'llmjax.commands.checkpoint',
        'llmjax.checkpoint.spec:VerifyOptions', None, 'llmjax checkpoint verify --workdir=runs/quickstart'),
    'checkpoint show': Command(
        'print the contents of a checkpoint: config, position in the data, arrays and their norms',
        'llmjax.commands.checkpoint', 'llmjax.checkpoint.spec:ShowOptions', None,
        'llmjax checkpoint show 400 --workdir=runs/quickstart'),
    'checkpoint diff': Command(
        'compare the arrays of two checkpoints', 'llmjax.commands.checkpoint',
        'llmjax.checkpoint.spec:DiffOptions', None, 'llmjax checkpoint diff 400 800 --workdir=runs/quickstart'),
    'checkpoint prune': Command(
        'remove the checkpoints that no retention rule keeps', 'llmjax.commands.checkpoint',
        'llmjax.checkpoint.spec:PruneOptions', None,
        'llmjax checkpoint prune --workdir=runs/quickstart --dry-run'),
    'checkpoint sign': Command(
        'write a checksum manifest for checkpoints that have none and that you trust', 'llmjax.commands.checkpoint',
        'llmjax.checkpoint.spec:SignOptions', None, 'llmjax checkpoint sign 400 --workdir=runs/quickstart'),
    'checkpoint migrate': Command(
        'rewrite a run of an older version for this one', 'llmjax.commands.checkpoint',
        'llmjax.checkpoint.spec:MigrateOptions', None, 'llmjax checkpoint migrate --workdir=runs/quickstart'),
    'adapter show': Command(
        "print an adapter's settings, its base and its arrays", 'llmjax.commands.adapter',
        'llmjax.adapt.spec:AdapterShowOptions', None, 'llmjax adapter show --workdir=runs/lora'),
    'adapter merge': Command(
        'merge an adapter into its base model', 'llmjax.commands.adapter',
        'llmjax.adapt.spec:AdapterMergeOptions', None, 'llmjax adapter merge --workdir=runs/lora --output=runs/merged'),
    'adapter export': Command(
        'write an adapter in the format of Hugging Face peft', 'llmjax.commands.adapter',
        'llmjax.adapt.spec:AdapterExportOptions', None,
        'llmjax adapter export --workdir=runs/lora --output=adapter'),
    'adapter import': Command(
        'import an adapter from Hugging Face peft', 'llmjax.commands.adapter',
        'llmjax.adapt.spec:AdapterImportOptions', None,
        'llmjax adapter import --peft=adapter --init-from=runs/quickstart --workdir=runs/imported'),
    'chaos': Command(
        'test fault tolerance: kill and damage a run repeatedly, and compare it bit for bit',
        'llmjax.cluster.chaos', 'llmjax.cluster.spec:ChaosOptions', 'llmjax.run.spec:PretrainSpec',
        'llmjax chaos --config=configs/pretrain/quickstart.py --steps=200 --kills=20'),
    'doctor': Command(
        'report versions, devices, memory and disk, and how to fix their problems', 'llmjax.cluster.doctor',
        'llmjax.cluster.spec:DoctorOptions', None, 'llmjax doctor'),
    'launch local': Command(
        'run a command in several processes on this machine', 'llmjax.cluster.local',
        'llmjax.cluster.local:LocalOptions', None,
        'llmjax launch local --processes=2 --devices-per-process=4 -- pretrain --config=FILE --workdir=DIR',
        launches=True),
    'launch tpu-vm': Command(
        'run a command on all hosts of a Cloud TPU VM', 'llmjax.cluster.tpu_vm',
        'llmjax.cluster.tpu_vm:TpuVmOptions', None,
        'llmjax launch tpu-vm --name=pod --zone=us-east5-b -- pretrain --config=FILE --workdir=DIR', launches=True),
    'launch slurm': Command(
        'submit a command to Slurm', 'llmjax.cluster.slurm', 'llmjax.cluster.slurm:SlurmOptions', None,
        'llmjax launch slurm --nodes=4 --gpus-per-node=8 -- pretrain --config=FILE --workdir=DIR',
        launches=True),
    'launch gke': Command(
        'submit a command to Kubernetes as a JobSet', 'llmjax.cluster.gke', 'llmjax.cluster.gke:GkeOptions', None,
        'llmjax launch gke --name=run --image=IMAGE --accelerator=tpu-v6e-slice --topology=4x4 -- '
        'pretrain --config=FILE --workdir=DIR', launches=True),
}


def load(reference):
  """Return the class that `module:Class` names."""
  module, _, name = reference.partition(':')
  return getattr(importlib.import_module(module), name)


def command_names():
  """Return the first words of all commands as text: 'prepare, pretrain, ...'."""
  return ', '.join(dict.fromkeys(name.split()[0] for name in COMMANDS))
