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


def write_voice_weights(file):
    """Write new weights of an encoder of voices."""
    from flowkit.audio.speakers import _Encoder

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = _Encoder()
        for name, weight in net.named_parameters():  # so that voices differ
            if "hh" not in name:  # larger recurrent weights make chaos
                torch.nn.init.normal_(weight, std=10.0 if name == "lstm.weight_ih_l0" else 0.3)
        torch.save({"model_state": net.state_dict(), "step": 1}, file)
    return file


def write_recognizer(file, states, width=8, codes=4):
    """Write a new recognizer of phones for a map of states."""
    from flowkit.audio import PhoneRecognizer

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = PhoneRecognizer(states.mel.n_mels, width, codes, states.hash)
        net.codebook.normal_()
    net.save(file)
    return file


def utterance(speaker, number, seconds=1.0, rate=16000):
    """Return a tone with three harmonics, higher for later speakers and numbers, with a vibrato."""
    time = torch.arange(int(rate * seconds)) / rate
    pitch = 150 * (1 + speaker) * (1 + 0.02 * number)
    phase = 2 * torch.pi * pitch * (time + 0.002 * torch.sin(20 * time))
    return 0.2 * sum(torch.sin(k * phase) / k for k in (1, 2, 3))


def write_vocoder(folder, mel):
    """Write a tiny vocoder of transformers for a spectrogram of hop 160; return its network."""
    transformers = pytest.importorskip("transformers")
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=mel.n_mels,
        upsample_initial_channel=16,
        upsample_rates=[16, 10],
        upsample_kernel_sizes=[32, 20],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1]],
        mel_hash=mel.hash,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = transformers.SpeechT5HifiGan(config).eval()
    net.save_pretrained(folder)
    return net


def write_speech(folder):
    """Write 2 speakers with utterances in the layout of LibriTTS, in train, dev and test."""
    pytest.importorskip("soundfile")
    from flowkit.audio import write_audio

    for subset, count in (("train-clean", 4), ("dev-clean", 2), ("test-clean", 3)):
        for speaker, name in enumerate(("84", "85")):
            place = folder / subset / name / "7"
            place.mkdir(parents=True)
            for k in range(count):
                file = place / f"{name}_7_{k:06d}.wav"
                write_audio(utterance(speaker, k, 0.6 + 0.2 * k), file)
                file.with_suffix(".normalized.txt").write_text(f"say number {k}\n")
    return folder


def write_place(folder):
    """Write speech, weights of an encoder, recognizers, a recording and a voice."""
    from flowkit.audio import LogMel, MelStates, write_audio

    write_speech(folder / "speech")
    write_voice_weights(folder / "weights.pt")
    write_recognizer(folder / "phones.safetensors", MelStates(LogMel()))
    wide = MelStates(LogMel(hop=256, n_mels=80))
    write_recognizer(folder / "phones80.safetensors", wide)
    write_audio(utterance(0, 5, 1.2), folder / "source.wav")
    write_audio(utterance(1, 6, 0.7), folder / "voice.wav")
    return folder


def of_place(folder, phones="phones"):
    """Return the options of a training on what `write_place` wrote."""
    return [
        f"data.root={folder}/speech",
        f"data.speaker.path={folder}/weights.pt",
        f"data.recognition.path={folder}/{phones}.safetensors",
        "data.recognition.width=8",
        "data.recognition.codes=4",
    ]
