"""Networks of the embedded pipeline: small instances of the classes of Stable Diffusion 3."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from omegaconf import DictConfig
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from flowalign.shapes import tokenizer


def new_vae(cfg: DictConfig) -> AutoencoderKL:
    blocks = len(cfg.vae.channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=tuple(cfg.vae.channels),
        layers_per_block=cfg.vae.layers,
        latent_channels=cfg.latent_channels,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def new_transformer(cfg: DictConfig) -> SD3Transformer2DModel:
    t = cfg.transformer
    width = t.heads * t.head_dim
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=cfg.latent_channels,
        out_channels=cfg.latent_channels,
        num_layers=t.layers,
        attention_head_dim=t.head_dim,
        num_attention_heads=t.heads,
        caption_projection_dim=width,
        joint_attention_dim=2 * cfg.text.width,
        pooled_projection_dim=2 * cfg.text.width,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
    )


def new_text_encoder(cfg: DictConfig) -> CLIPTextModelWithProjection:
    tok = tokenizer.build()
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tok),
            hidden_size=cfg.text.width,
            intermediate_size=4 * cfg.text.width,
            projection_dim=cfg.text.width,
            num_hidden_layers=cfg.text.layers,
            num_attention_heads=cfg.text.heads,
            max_position_embeddings=tokenizer.MAX_LENGTH,
            bos_token_id=tok.bos_token_id,
            eos_token_id=tok.eos_token_id,
            pad_token_id=tok.pad_token_id,
        )
    )


class Generator(nn.Module):
    """Transformer and both text encoders, trained jointly; the text path is the pipeline's, with one empty T5 token."""

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__()
        self.transformer = new_transformer(cfg)
        self.text_encoder = new_text_encoder(cfg)
        self.text_encoder_2 = new_text_encoder(cfg)
        nn.init.zeros_(self.transformer.proj_out.weight)
        nn.init.zeros_(self.transformer.proj_out.bias)
        # adaLN-zero, for which diffusers keeps the default initialisation.
        for block in self.transformer.transformer_blocks:
            for norm in (block.norm1, block.norm1_context):
                nn.init.zeros_(norm.linear.weight)
                nn.init.zeros_(norm.linear.bias)
        nn.init.normal_(self.transformer.pos_embed.proj.bias, std=0.02)

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        outs = [encoder(ids, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        tokens = torch.cat([out.hidden_states[-2] for out in outs], dim=-1)
        empty_t5 = tokens.new_zeros(len(ids), 1, tokens.shape[-1])
        return torch.cat([tokens, empty_t5], dim=1), torch.cat([out.text_embeds for out in outs], dim=-1)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        tokens, pooled = self.encode(ids)
        return self.transformer(
            hidden_states=x,
            timestep=1000 * t,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
