"""ModelSpec fields of published models."""

_LLAMA2 = dict(rope_theta=10000.0, norm_epsilon=1e-5, vocab_size=32000)
_LLAMA3 = dict(rope_theta=500000.0, norm_epsilon=1e-5, vocab_size=128256)

PRESETS = {
    # Llama 2, arXiv:2307.09288, section 2.2 and table 1.
    'llama2_7b': dict(_LLAMA2, num_layers=32, d_model=4096, num_heads=32, mlp_dim=11008),
    'llama2_13b': dict(_LLAMA2, num_layers=40, d_model=5120, num_heads=40, mlp_dim=13824),
    'llama2_70b': dict(_LLAMA2, num_layers=80, d_model=8192, num_heads=64, num_kv_heads=8,
                       mlp_dim=28672),
    # Llama 3, arXiv:2407.21783, table 3.
    'llama3_8b': dict(_LLAMA3, num_layers=32, d_model=4096, num_heads=32, num_kv_heads=8,
                      mlp_dim=14336),
    'llama3_70b': dict(_LLAMA3, num_layers=80, d_model=8192, num_heads=64, num_kv_heads=8,
                       mlp_dim=28672),
    'llama3_405b': dict(_LLAMA3, num_layers=126, d_model=16384, num_heads=128, num_kv_heads=8,
                        mlp_dim=53248),
    # Mixtral, arXiv:2401.04088, table 1.
    'mixtral_8x7b': dict(num_layers=32, d_model=4096, num_heads=32, num_kv_heads=8, mlp_dim=14336,
                         num_experts=8, experts_per_token=2, rope_theta=1e6, norm_epsilon=1e-5,
                         vocab_size=32000, balance_loss=0.02, router_z_loss=0.0),
}
