"""Mixtures of sounds: what is in them, what they depend on, and which notes a split holds."""

import math
import shutil
import struct
from pathlib import Path

import pytest
import torch

from flowkit.audio import LogMel, MelStates, TextEncoder
from flowkit.data import CaptionedAudio, Instruments
from flowkit.data.broken import BrokenFiles
from flowkit.data.instruments import Notes, detuned, divided, recordings
from flowkit.data.mixtures import PEAKS, MixtureList
from flowkit.data.soundfonts import midi_file, samples_of_keys
from tests.audio.conftest import clips, tiny_encoder  # noqa: F401  # fixtures

STATES = MelStates(LogMel())
FONT = Path("/usr/share/sounds/sf2/FluidR3_GM.sf2")
RENDERS = pytest.mark.skipif(
    not FONT.is_file() or shutil.which("fluidsynth") is None, reason="no soundfont"
)


class Tones:
    """Sources of one frequency each, whose texts are their numbers."""

    captions = tuple((f"tone {k}", f"number {k}") for k in range(5))

    def draw(self, kind, samples, generator):
        time = torch.arange(samples) / 16000
        return (kind + 1) * 0.1 * torch.sin(2 * math.pi * 437.5 * (kind + 1) * time)

    def fingerprint(self):
        return "tones"


def query(texts):
    return {"vector": torch.tensor([[float(text[-1])] for text in texts])}


def tones(size=200, name="test", seed=0, most=2, snr=(-15.0, 15.0)):
    return MixtureList(Tones(), size, (name, seed), STATES, query, 65, snr, most)


def shares(waves):
    """Energy of each tone, by its own frequency; 64 · 160 samples hold whole periods of all."""
    spectrum = torch.fft.rfft(waves).abs().square()
    bins = [280 * (k + 1) for k in range(5)]
    return spectrum[:, bins]


def test_a_mixture_holds_its_target_at_a_ratio_in_the_range():
    sounds = tones().sounds(slice(None))
    rest = sounds.mixture - sounds.target
    ratio = 10 * torch.log10(sounds.target.square().sum(1) / rest.square().sum(1))
    assert ratio.min() > -15.001
    assert ratio.max() < 15.001
    assert abs(ratio.mean()) < 2  # uniform: 8.7 / sqrt(200) = .6
    assert 7.5 < ratio.std() < 9.9
    peaks = 20 * torch.log10(sounds.mixture.abs().amax(1))
    assert peaks.max() <= PEAKS[1] + 1e-4
    assert peaks.min() >= PEAKS[0] - 1e-4
    assert peaks.std() > 4  # uniform: 5.2


@pytest.mark.parametrize("most", [2, 3])
def test_texts_name_the_target_and_an_absent_sound(most):
    sounds = tones(60, most=most).sounds(slice(None))
    target, mixture = shares(sounds.target), shares(sounds.mixture)
    heard = mixture > 1e-6 * mixture.amax(1, keepdim=True)
    asked, absent = (
        torch.tensor([int(text[-1]) for text in texts])
        for texts in (sounds.captions, sounds.absent)
    )
    assert torch.equal(target.argmax(1), asked)
    assert heard.gather(1, asked[:, None]).all()
    assert not heard.gather(1, absent[:, None]).any()
    assert sorted(set(heard.sum(1).tolist())) == list(range(2, most + 1))
    for row, own, others in zip(heard, asked.tolist(), sounds.others, strict=True):
        assert row.nonzero()[:, 0].tolist() == sorted([own, *(int(text[-1]) for text in others)])
    assert {text.split()[0] for text in sounds.captions} == {"tone", "number"}  # all wordings


def test_a_mixture_is_a_function_of_split_seed_and_number():
    one = tones()
    whole = one[:20]
    parts = [one[[k]] for k in (3, 19, 0)]
    for part, k in zip(parts, (3, 19, 0), strict=True):
        torch.testing.assert_close(part["x1"][0], whole["x1"][k], atol=1e-5, rtol=0)
        assert torch.equal(part["cond"]["vector"][0], whole["cond"]["vector"][k])
    for other in (tones(name="val"), tones(seed=1)):
        assert not torch.equal(other[:20]["cond"]["vector"], whole["cond"]["vector"])
        assert other.fingerprint() != one.fingerprint()
    assert tones(snr=(0.0, 1.0)).fingerprint() != one.fingerprint()
    assert tones().fingerprint() == one.fingerprint()


def test_batches_hold_states_of_target_and_mixture():
    split = tones()
    sounds, batch = split.sounds([4, 7]), split[[4, 7]]
    torch.testing.assert_close(STATES.decode(batch["x1"]), STATES.mel(sounds.target))
    torch.testing.assert_close(STATES.decode(batch["cond"]["frames"]), STATES.mel(sounds.mixture))
    image = MelStates(LogMel(), layout="image")
    assert torch.equal(image.encode(STATES.mel(sounds.target))[:, 0].mT, batch["x1"])
    torch.testing.assert_close(
        image.decode(image.of_waves(sounds.target)), STATES.mel(sounds.target)
    )


# --- clips ------------------------------------------------------------------------------------


def captioned(root, encoder, **options):
    data = CaptionedAudio(
        STATES,
        TextEncoder(encoder, longest=8),
        root,
        **{"frames": 20, "eval_mixtures": 6, "train_mixtures": 50, "batch_size": 4, **options},
    )
    data.setup()
    return data


def test_a_resumed_stream_reads_the_same_mixtures(clips, tiny_encoder):  # noqa: F811
    first, again = captioned(clips, tiny_encoder), captioned(clips, tiny_encoder)
    batches = [first.stream()[k] for k in range(4)]
    later = again.stream()[3]
    assert torch.equal(batches[3]["x1"], later["x1"])
    assert torch.equal(batches[3]["cond"]["frames"], later["cond"]["frames"])
    assert not torch.equal(batches[0]["x1"], batches[1]["x1"])
    assert first.hashes() == again.hashes()
    assert first.record()["preprocessing"] == first.hashes()
    assert first.summary().startswith("CaptionedAudio: 50 train, 6 val, 6 test samples of shape")


def test_splits_share_no_clip(clips, tiny_encoder):  # noqa: F811
    data = captioned(clips, tiny_encoder)
    names = {name: set(data.listed(name).sources.names) for name in ("train", "val", "test")}
    assert names["train"] == {f"{k}.wav" for k in range(5)}
    assert names["val"] == {f"{k}.wav" for k in range(5, 10)}
    assert data.files["12.wav"][1] == "test"


def test_clips_of_other_lengths_are_cut_or_surrounded_by_silence(clips, tiny_encoder):  # noqa: F811
    source = captioned(clips, tiny_encoder).listed("train").sources
    whole = source.draw(0, 8000, torch.Generator())
    part = source.draw(0, 3000, torch.Generator())
    start = int((whole.unfold(0, 3000, 1) - part).abs().sum(1).argmin())
    assert torch.equal(whole[start : start + 3000], part)
    longer = source.draw(0, 12000, torch.Generator())
    before = int(longer.nonzero()[0, 0]) - int(whole.nonzero()[0, 0])
    assert torch.equal(longer[before : before + 8000], whole)
    assert longer.count_nonzero() == whole.count_nonzero()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("file,caption\n0.wav,violin\n1.wav,\n", "caption must be given .* none in row 2 of"),
        (
            "file,caption\n0.wav,violin\nnone.wav,a\n",
            "must name a file in .*, got none.wav in row 2",
        ),
        ("file,caption\n../0.wav,violin\n", "must name a file in .* in row 1"),
        ("file,text\n0.wav,violin\n", "must have columns file and caption, got file, text"),
        ("file,caption,split\n0.wav,violin,dev\n", "split must be one of .* got dev in row 1"),
        ("file,caption\n", "captions must hold rows"),
        ("file,caption,split\n0.wav,a,train\n1.wav,a,val\n2.wav,b,test\n", "sounds must be below"),
    ],
)
def test_bad_tables_name_the_row(clips, tiny_encoder, tmp_path, table, message):  # noqa: F811
    file = tmp_path / "captions.csv"
    file.write_text(table)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        captioned(clips, tiny_encoder, captions=file)


def test_broken_clips_are_named_before_the_training(clips, tiny_encoder, tmp_path):  # noqa: F811
    root = shutil.copytree(clips, tmp_path / "clips")
    (root / "0.wav").write_text("no sound")
    (root / "7.wav").write_bytes(b"")
    with pytest.raises(BrokenFiles) as caught:
        captioned(root, tiny_encoder).listed("val")
    names = [broken.partition(" ")[0] for broken in caught.value.broken]
    assert names == [f"{root}/0.wav", f"{root}/7.wav"]


def test_tables_of_published_data_are_read(clips, tiny_encoder, tmp_path):  # noqa: F811
    waves = tmp_path / "waves"
    waves.mkdir()
    for k in range(12):
        shutil.copy(clips / f"{k}.wav", waves / f"Y-id{k}.wav")
    table = tmp_path / "audiocaps.csv"
    rows = [f"{k},-id{k % 12},30,a {'violin' if k < 12 else 'loud flute'}" for k in range(24)]
    table.write_text("audiocap_id,youtube_id,start_time,caption\n" + "\n".join(rows))
    data = captioned(waves, tiny_encoder, captions=table, val_fraction=0.3, test_fraction=0.3)
    sources = [data.listed(name).sources for name in ("train", "val", "test")]
    assert sum(len(source.names) for source in sources) == 12
    assert sources[0].captions[0] == ["a violin", "a loud flute"]
    wavcaps = tmp_path / "wavcaps.json"
    wavcaps.write_text('{"data": [{"id": "Y-id3", "caption": "a bell", "duration": 1.0}]}')
    from flowkit.data.captioned_audio import read_captions

    assert read_captions(wavcaps, waves) == [("Y-id3.wav", "a bell", None)]


# --- instruments ------------------------------------------------------------------------------


def test_keys_that_share_a_sample_stay_together():
    keys = {k: frozenset({k // 3, 100 + k // 4}) for k in range(24)}
    groups = recordings(keys)
    assert sorted(k for group in groups for k in group) == list(range(24))
    for a in groups:
        for b in groups:
            common = {s for k in a for s in keys[k]} & {s for k in b for s in keys[k]}
            assert (a == b) == bool(common)
    parts = divided([[2 * k, 2 * k + 1] for k in range(20)], 0, "violin")
    assert sorted(k for part in parts.values() for k in part) == list(range(40))
    assert {name: len(part) for name, part in parts.items()} == {"train": 28, "val": 4, "test": 8}


def test_a_sound_is_a_sum_of_notes_of_its_instrument():
    waves = [torch.full((3, 400), 2**14, dtype=torch.int16), torch.zeros(1, 400).short()]
    notes = Notes(waves, (("a",), ("b",)), rate=160)
    counts = set()
    for seed in range(40):
        wave = notes.draw(0, 1000, torch.Generator().manual_seed(seed))
        assert set((2 * wave).tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0}
        assert int(wave.nonzero()[0, 0]) < 500
        counts.add(round(float(wave.sum()) / 200, 1))
    assert 1.0 in counts  # a single note, all of it
    assert max(counts) > 2
    assert not notes.draw(1, 1000, torch.Generator()).any()


def test_a_midi_file_holds_the_notes_at_their_times():
    track = midi_file(40, [(60, 100), (72, 64)], 1000, 1600)[22:]
    events, at, place = [], 0, 0
    while place < len(track):
        wait = 0
        while True:
            wait, more = wait << 7 | track[place] & 127, track[place] & 128
            place += 1
            if not more:
                break
        at += wait
        kind = track[place]
        size = {0xFF: 3 + track[place + 2] if kind == 0xFF else 0, 0xC0: 2}.get(kind, 3)
        if kind in (0x90, 0x80):
            events.append((at, kind, *track[place + 1 : place + 3]))
        place += size
    assert events == [
        (0, 0x90, 60, 100),
        (1000, 0x80, 60, 0),
        (1600, 0x90, 72, 64),
        (2600, 0x80, 72, 0),
    ]
    assert at == 3200


def soundfont(file, *, cut=None):
    """A soundfont with one program of two recordings: sample 0 for keys 0 to 63, 1 from 60 on."""

    def chunk(name, content):
        return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)

    tables = {
        b"phdr": struct.pack("<20sHHHIII", b"a", 40, 0, 0, 0, 0, 0)
        + struct.pack("<20sHHHIII", b"drum", 0, 128, 1, 0, 0, 0)
        + struct.pack("<20sHHHIII", b"EOP", 0, 0, 2, 0, 0, 0),
        b"pbag": struct.pack("<HHHHHH", 0, 0, 1, 0, 2, 0),
        b"pgen": struct.pack("<HHHH", 41, 0, 41, 0),
        b"inst": struct.pack("<20sH20sH", b"i", 0, b"EOI", 3),
        b"ibag": struct.pack("<8H", 0, 0, 1, 0, 3, 0, 5, 0),
        b"igen": struct.pack("<HHHHHHHHHH", 51, 0, 43, 63 << 8, 53, 0, 43, 127 << 8 | 60, 53, 1),
    }
    pdta = b"pdta" + b"".join(chunk(name, table) for name, table in tables.items())
    body = b"sfbk" + chunk(b"LIST", b"sdta") + chunk(b"LIST", pdta)
    file.write_bytes(chunk(b"RIFF", body)[:cut])


def test_a_soundfont_tells_which_samples_play_a_key(tmp_path):
    soundfont(tmp_path / "a.sf2")
    found = samples_of_keys(tmp_path / "a.sf2")
    assert list(found) == [40]  # drums are of another bank
    assert found[40][59] == {0}
    assert found[40][60] == {0, 1}
    assert found[40][64] == {1}
    assert len(found[40]) == 128


def test_bad_soundfonts_are_refused_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get install fluidsynth fluid-soundfont-gm"):
        samples_of_keys(tmp_path / "none.sf2")
    file = tmp_path / "a.sf2"
    soundfont(file, cut=250)
    with pytest.raises(ValueError, match="font must be a soundfont, got"):
        samples_of_keys(file)
    file.write_text("no soundfont")
    with pytest.raises(ValueError, match="font must be a soundfont, got"):
        samples_of_keys(file)
    soundfont(file)
    with pytest.raises(ValueError, match="3 recordings of each instrument, got 0 of piano"):
        _ = Instruments(STATES, TextEncoder(), file).keys


def test_a_missing_fluidsynth_names_its_package(monkeypatch, tmp_path):
    from flowkit.data import soundfonts

    monkeypatch.setattr(soundfonts, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="apt-get install fluidsynth"):
        soundfonts.render(tmp_path, 0, [(60, 100)], 16000, 1.0, 1.6)


@RENDERS
def test_no_recording_of_a_test_note_is_heard_in_training():
    keys, programs = Instruments(STATES, TextEncoder()).keys, samples_of_keys(FONT)
    from flowkit.data.instruments import PLAYED

    for name, (program, _, _) in PLAYED.items():
        heard = [
            {sample for key in keys[name][split] for sample in programs[program][key]}
            for split in ("train", "val", "test")
        ]
        assert all(heard)
        assert not heard[0] & heard[1] | heard[0] & heard[2] | heard[1] & heard[2]


def test_detuned_notes_have_shifted_frequencies_and_end_in_silence():
    time = torch.arange(16000) / 16000
    waves = (2e4 * torch.sin(2 * math.pi * 400 * time)).short().repeat(40, 1)
    found = detuned(waves, 3.0, torch.Generator().manual_seed(0))
    assert found.dtype == torch.int16
    assert torch.equal(found, detuned(waves, 3.0, torch.Generator().manual_seed(0)))
    middle = found[:, 2000:12000].float() * torch.hann_window(10000)
    semitones = 12 * torch.log2(torch.fft.rfft(middle).abs().argmax(1) * 1.6 / 400)
    assert semitones.abs().max() < 3.1  # one bin is .07
    assert semitones.min() < -2.4
    assert semitones.max() > 2.4
    for wave, shift in zip(found, semitones.tolist(), strict=True):
        length = int(16000 / 2 ** (shift / 12))
        if length < 15000:
            assert not wave[length + 200 :].any()
        rms = wave[2000 : min(length, 16000) - 1500].double().square().mean().sqrt()
        assert rms == pytest.approx(2e4 / 2**0.5, rel=0.01)


@RENDERS
def test_only_training_notes_are_detuned():
    plain, other = (Instruments(STATES, TextEncoder(), detune=d).sources() for d in (0.0, 2.0))
    for kind in (0, 7):
        for split in ("val", "test"):
            assert torch.equal(plain[split].waves[kind], other[split].waves[kind])
        count = len(plain["train"].waves[kind])
        assert torch.equal(other["train"].waves[kind][:count], plain["train"].waves[kind])
        assert len(other["train"].waves[kind]) == 4 * count
        assert not torch.equal(
            other["train"].waves[kind][count : 2 * count], plain["train"].waves[kind]
        )
    with pytest.raises(ValueError, match=r"detune must .*12.*got 13"):
        Instruments(STATES, TextEncoder(), detune=13)


@RENDERS
@pytest.mark.slow
def test_rendered_notes_have_the_frequencies_of_their_keys():
    from flowkit.data.soundfonts import render

    notes = [(69, 100), (81, 100), (69, 40)]
    waves = render(FONT, 73, notes, 16000, 1.0, 1.6)  # a flute, whose first partial is strong
    spectrum = torch.fft.rfft(waves[:, 1600:14400] * torch.hann_window(12800)).abs()
    found = spectrum.argmax(1) * 16000 / 12800
    torch.testing.assert_close(found, torch.tensor([440.0, 880.0, 440.0]), atol=5, rtol=0)
    assert waves[0].abs().max() > 1.5 * waves[2].abs().max()
    assert waves[:, -100:].abs().max() < 0.01 * waves.abs().max()
    assert torch.equal(render(FONT, 73, notes, 16000, 1.0, 1.6), waves)
