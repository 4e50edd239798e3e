"""A tiny encoder of texts, and a folder of clips with captions."""

import json

import pytest
import torch

WORDS = ["violin", "flute", "drum", "bell", "a", "plays", "loud", "horn"]


def write_encoder(folder):
    """Write a new BERT of 16 channels, with a vocabulary of a few words."""
    transformers = pytest.importorskip("transformers")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]))
    config = transformers.BertConfig(
        vocab_size=4 + len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "model_max_length": 64})
    )
    return folder


def write_clips(folder):
    """Write fifteen clips of half a second with captions, five in each split."""
    pytest.importorskip("soundfile")
    from flowkit.audio import write_audio

    rows = ["file,caption,split"]
    time = torch.arange(8000) / 16000
    for k in range(15):
        wave = 0.5 * torch.sin(2 * torch.pi * 200 * (k + 1) * time)
        write_audio(wave, folder / f"{k}.wav")
        rows.append(f"{k}.wav,a {WORDS[k % 5]} plays,{('train', 'val', 'test')[k // 5]}")
    (folder / "captions.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory):
    """A folder of a tiny encoder of texts."""
    return write_encoder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A folder of clips."""
    return write_clips(tmp_path_factory.mktemp("clips"))
