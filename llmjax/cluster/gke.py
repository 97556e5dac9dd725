"""`llmjax launch gke`: submits a command as a Kubernetes JobSet, on TPU slices or GPU nodes.

TPU hosts discover each other through variables that GKE sets; GPU nodes through variables in the manifest.
"""

import dataclasses
import difflib
import math
import re

from llmjax.cluster.submit import run_tool, shell_line
from llmjax.cluster.supervise import REFUSED
from llmjax.config import setting

PORT = 8476
NAME = re.compile(r'[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?')  # A label of RFC 1123, short enough for JobSet's suffixes.
# Number of dimensions of the topology by node pool label: https://cloud.google.com/kubernetes-engine/docs/concepts/tpus
DIMENSIONS = {'tpu-v4-podslice': 3, 'tpu-v5-lite-podslice': 2, 'tpu-v5p-slice': 3, 'tpu-v6e-slice': 2, 'tpu7x': 3}
INSTALL = 'https://kubernetes.io/docs/tasks/tools'


@dataclasses.dataclass(frozen=True)
class GkeOptions:
  """Flags of `llmjax launch gke`."""

  name: str = setting('llmjax', 'name of the JobSet')
  image: str = setting('', 'container image with llmjax installed')
  accelerator: str = setting('', 'accelerator label of the node pool, such as tpu-v6e-slice or nvidia-h100-80gb')
  topology: str = setting('', 'TPU: topology of a slice, such as 4x4 or 2x2x2')
  chips_per_node: int = setting(0, 'TPU chips or GPUs per node; 0: 4 TPU chips or 8 GPUs', minimum=0)
  nodes: int = setting(0, 'GPU: number of nodes; of TPUs it follows from the topology', minimum=0)
  slices: int = setting(1, 'TPU: number of slices', minimum=1)
  namespace: str = setting('default', 'Kubernetes namespace')
  service_account: str = setting('', "Kubernetes service account; '': the default account")
  setup: str = setting('', "shell commands to run first, such as 'cd /llmjax'")
  save_seconds: int = setting(180, 'grace period in seconds for an evicted pod to save a checkpoint', minimum=1)
  restart: int = setting(0, 'maximum number of restarts of all pods after one fails or is evicted', minimum=0)
  check: bool = setting(True, 'check the command before submitting it; --nocheck if only the image has the recipe')
  dry_run: bool = setting(False, 'print the manifest without submitting it')

  def validate(self):
    if not self.image:
      yield 'image is missing; name a container image that has llmjax installed'
    if not self.accelerator:
      yield 'accelerator is missing; `kubectl get nodes -L cloud.google.com/gke-tpu-accelerator` shows the labels'
    if not NAME.fullmatch(self.name):
      yield (f'name={self.name!r} must be at most 40 lower-case letters, digits and dashes, '
             'with none of the dashes at an end')
    near = difflib.get_close_matches(self.accelerator, DIMENSIONS, n=1)
    if self.is_tpu and self.accelerator not in DIMENSIONS and near:
      yield f'accelerator={self.accelerator} is not a GKE label; did you mean {near[0]}?'
    sizes = self.topology.split('x')
    if self.is_tpu and not all(s.isdigit() and int(s) for s in sizes):
      yield f'topology={self.topology!r} must be the topology of a slice, such as 4x4'
    elif self.is_tpu and len(sizes) != DIMENSIONS.get(self.accelerator, len(sizes)):
      like = 'x'.join(['4'] * DIMENSIONS[self.accelerator])
      yield f'topology={self.topology} must have {DIMENSIONS[self.accelerator]} sizes for {self.accelerator}: {like}'
    elif self.is_tpu and math.prod(map(int, sizes)) > self.chips and math.prod(map(int, sizes)) % self.chips:
      yield f'topology={self.topology} is not divisible by chips_per_node={self.chips}'
    if self.is_tpu and self.nodes:
      yield f"nodes={self.nodes} is for GPUs; the number of TPU nodes follows from topology, so leave it out"
    if self.accelerator and not self.is_tpu and (self.topology or self.slices > 1):
      yield f'topology and slices are for TPUs, not for {self.accelerator}; write nodes=N'

  @property
  def is_tpu(self):
    return self.accelerator.startswith('tpu')

  @property
  def chips(self):
    """Chips per node."""
    whole = math.prod(map(int, self.topology.split('x'))) if self.is_tpu and self.topology else 8
    return self.chips_per_node or (min(4, whole) if self.is_tpu else 8)

  @property
  def node_count(self):
    """Nodes per TPU slice, or total number of GPU nodes."""
    if self.is_tpu:
      return math.prod(map(int, self.topology.split('x'))) // self.chips
    return max(self.nodes, 1)


def run(command, options):
  """Submit the JobSet; return the status of kubectl."""
  return run_tool(['kubectl', 'apply', '-f', '-'], manifest(command, options), dry_run=options.dry_run,
                  install=INSTALL)


def manifest(command, options):
  """Return the YAML of the JobSet."""
  import yaml
  metadata, failure_policy = {'name': options.name, 'namespace': options.namespace}, {'maxRestarts': options.restart}
  if options.is_tpu:  # One slice per node pool: GKE numbers slices and hosts by it.
    metadata['annotations'] = {'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'}
  job = {'parallelism': options.node_count, 'completions': options.node_count, 'backoffLimit': 0,
         'completionMode': 'Indexed'}
  if options.restart:  # Invalid settings are not retried: the pod's failure fails its job, and thereby the JobSet.
    failure_policy['rules'] = [{'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']}]
    exit_codes = {'containerName': 'llmjax', 'operator': 'In', 'values': [REFUSED]}
    job['podFailurePolicy'] = {'rules': [{'action': 'FailJob', 'onExitCodes': exit_codes}]}
  job['template'] = {'spec': pod_spec(command, options)}
  jobset = {'apiVersion': 'jobset.x-k8s.io/v1alpha2', 'kind': 'JobSet', 'metadata': metadata,
            'spec': {'failurePolicy': failure_policy,
                     'replicatedJobs': [{'name': 'host', 'replicas': options.slices, 'template': {'spec': job}}]}}
  return yaml.safe_dump(jobset, sort_keys=False, width=10_000)


def pod_spec(command, options):
  """Return the spec of the pods as nested dicts."""
  container = {'name': 'llmjax', 'image': options.image,
               'command': ['bash', '-c', shell_line(command, options.setup)]}
  if options.is_tpu:
    selector = {'gke-tpu-accelerator': options.accelerator, 'gke-tpu-topology': options.topology}
    resource, ports = 'google.com/tpu', (8471, 8431, 8482)  # TPU runtime, its metrics, JAX's coordination service.
  else:
    selector, resource, ports = {'gke-accelerator': options.accelerator}, 'nvidia.com/gpu', (PORT,)
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    container['env'] = [
        {'name': 'LLMJAX_COORDINATOR', 'value': f'{options.name}-host-0-0.{options.name}:{PORT}'},
        {'name': 'LLMJAX_PROCESSES', 'value': str(options.node_count)},
        {'name': 'LLMJAX_PROCESS_ID', 'valueFrom': {'fieldRef': {'fieldPath': index}}}]
  container.update(ports=[{'containerPort': port} for port in ports],
                   resources={'limits': {resource: options.chips}})
  account = {'serviceAccountName': options.service_account} if options.service_account else {}
  return {'restartPolicy': 'Never', 'terminationGracePeriodSeconds': options.save_seconds, **account,
          'nodeSelector': {f'cloud.google.com/{name}': value for name, value in selector.items()},
          'containers': [container]}
