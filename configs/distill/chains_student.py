"""A student of configs/distill/chains_teacher.py, trained on a small data set.

    llmjax pretrain --config=configs/distill/chains_student.py --workdir=runs/chains_student
    llmjax pretrain --config=configs/distill/chains_student.py --workdir=runs/chains_scratch --config.distill.teacher=

--config.distill.loss=hinton, jsd or reverse_kl are other losses; --config.distill.top_k=8 caches the
teacher's top 8 log-probabilities; --config.distill.init=every_2nd initializes the student with the teacher's layers,
and needs its width: --config.model.d_model=64.
"""

from ml_collections import config_dict


def get_config():
  c = config_dict.ConfigDict()
  c.model = dict(num_layers=1, d_model=48, num_heads=4, mlp_dim=192, tie_embeddings=True)
  c.data = dict(sources={'data/chains_few': 1.0}, seq_len=32, packing='best_fit')
  c.train = dict(steps=600, batch_size=32, log_every=100, compute_dtype='float32')
  c.optimizer = dict(lr=1e-2, warmup_steps=20, weight_decay=0.0)
  c.distill = dict(teacher='runs/chains_teacher')
  c.evaluate = dict(extra_sources=('data/chains_many',))  # Held-out texts of the teacher's source.
  return c
