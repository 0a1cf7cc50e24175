"""The freedom of the plain architectures, counted by hand: (groups, independent orders)."""

from __future__ import annotations

COUNTED: dict[str, tuple[int, int]] = {
    "vgg": (4, 4), "resnet_bottleneck": (9, 9), "resnet_preactivation": (4, 4), "mobilenet_v3": (7, 7),
    "convnext_block": (3, 3), "squeezenet_fire": (7, 7), "inception": (7, 7), "mixer": (5, 5),
    "depthwise_multiplier": (4, 14), "resnext": (4, 8), "incompatible_groups": (5, 8), "shufflenet_v1": (3, 13),
    "shufflenet_v1_concatenated": (5, 17), "shufflenet_v2": (9, 9), "pixel_shuffle": (2, 2), "unet_interpolate": (5, 5),
    "gan_generator": (2, 2), "vae": (3, 3), "weight_normed": (2, 2), "spectral_normed": (2, 2),
    "conv_lstm_cell": (1, 1),
    "rnn_tanh_last": (1, 1), "rnn_relu": (2, 2), "lstm_one_no_bias": (1, 1), "lstm_two": (2, 2),
    "lstm_projected": (4, 4), "lstm_bidirectional_mean": (4, 4), "lstm_bidirectional_state": (2, 2),
    "gru_two_bidirectional": (4, 4), "gru_time_first": (1, 1), "lstm_batch_first": (1, 1), "cells_loop": (2, 2),
    "handwritten_lstm": (1, 1), "packed_lstm": (2, 2), "packed_gru_state": (2, 2),
    "embedding_lstm_attention_pooling": (4, 4), "seq2seq": (3, 3), "stacked_lstms": (2, 2),
    "learned_initial_state": (2, 2), "concatenated_cell": (1, 1),
    "vit_multihead": (5, 9), "transformer_encoder": (9, 13), "transformer_full": (13, 19), "cross_attention": (5, 9),
    "causal_decoder": (5, 7), "attention_pooling": (4, 8), "gated_attention_unit": (3, 3), "qkv_chunk": (4, 8),
    "qkv_unbind": (4, 6), "qkv_index": (4, 8), "qkv_per_head_chunk": (4, 10), "qkv_einsum": (4, 8),
    "separate_qkv_sdpa": (4, 8), "grouped_query_sdpa": (5, 11), "grouped_query_repeat": (5, 8), "multi_query": (4, 4),
    "rotary": (3, 4), "linear_attention": (4, 8), "relative_bias": (4, 8),
    "siamese_convolutional": (3, 3), "actor_critic": (4, 4), "deep_sets": (3, 3), "autoencoder_convolutional": (5, 5),
    "highway": (1, 1), "multi_scale": (2, 2), "graph_convolution": (2, 2), "neural_ode_euler": (2, 2),
    "normalising_coupling": (2, 2), "transformer_conv_hybrid": (6, 8), "gated_convolution": (2, 2),
    "mixture_density": (2, 2), "film": (3, 3), "bilinear": (3, 3), "embedding_bag": (2, 2), "hypernetwork": (3, 3),
    "tabular": (4, 4), "mixture_of_experts_loop": (5, 5), "mixture_of_experts_stacked": (4, 6),
    "mixture_of_experts_top_k": (5, 5), "numpy_in_forward": (2, 2), "data_dependent_branch": (3, 3), "in_place": (2, 2),
    "view_write": (3, 3),
}  # fmt: skip

# Where less is found than there is: what is found, and why the rest is out of reach.
FOUND_LESS: dict[str, tuple[tuple[int, int], str]] = {
    "incompatible_groups": (
        (1, 4), "three groups of a norm and four of a convolution have no common product; stretches are not looked for"
    ),
    "shufflenet_v1": ((3, 7), "a family is indexed by a set of groups, so not twice by the same one"),
    "numpy_in_forward": ((1, 1), "what happens in NumPy is not seen"),
    "data_dependent_branch": ((1, 1), "the branch that is not taken is not seen; the proof finds it on other inputs"),
}  # fmt: skip
