"""Tiny pipelines of diffusers, built from configurations with random weights."""

import string

import torch


def _clip(projection, width=8):
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
    )

    letters = string.ascii_lowercase
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: k for k, word in enumerate(words)}
    config = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=width,
        bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=vocab["<|endoftext|>"],
        pad_token_id=vocab["<|endoftext|>"],
    )
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
    return model.eval(), CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def _t5(width=16):
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -1.0)]
    pieces += [(letter, -2.0) for letter in string.ascii_lowercase]
    config = T5Config(
        vocab_size=len(pieces), d_model=width, d_ff=16, d_kv=8, num_layers=1, num_heads=2
    )
    return T5EncoderModel(config).eval(), T5TokenizerFast(vocab=pieces, extra_ids=0)


def _vae(channels):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5,
        shift_factor=0.06,
    ).eval()


def stable_diffusion_3(with_t5=False, **scheduler):
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=16,
    )
    (clip, tokenizer), (clip_2, tokenizer_2) = _clip(True), _clip(True)
    t5, tokenizer_3 = _t5() if with_t5 else (None, None)
    return _quiet(
        StableDiffusion3Pipeline(
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
            vae=_vae(4),
            text_encoder=clip,
            tokenizer=tokenizer,
            text_encoder_2=clip_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=t5,
            tokenizer_3=tokenizer_3,
        )
    )


def flux(guidance_embeds=True):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
    )
    (clip, tokenizer), (t5, tokenizer_2) = _clip(False), _t5()
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64
    )
    return _quiet(
        FluxPipeline(
            transformer=transformer.eval(),
            scheduler=scheduler,
            vae=_vae(4),
            text_encoder=clip,
            tokenizer=tokenizer,
            text_encoder_2=t5,
            tokenizer_2=tokenizer_2,
        )
    )


def _quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
