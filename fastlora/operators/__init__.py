"""The operators, one file each: schema, fake kernel, choice, gradients, the public function, and what of it is measured.

lora_linear             a frozen linear layer with its LoRA update, or several that share x, where each row may have an adapter of its own
frozen_linear           a frozen linear layer
scale_columns           one factor a column: the epilogue of DoRA's layers and of IA³'s
dora_factor             DoRA's factors
prefix_concat           soft prompts in front of a batch
linear_cross_entropy    the loss of labels under a language model's head
lora_cross_entropy      the same where the head has an adapter
attention               softmax attention within segments of tokens
rms_norm                a frozen root mean square norm
rotary                  queries and keys turned by the angles of their positions
swiglu                  what a gated MLP does between its products
"""
