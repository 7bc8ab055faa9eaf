"""Where in a model a site is, by its path and by what the run says of its model."""

from __future__ import annotations

from stabilitylab.runs.places import Places


def test_sites_tell_where_they_are() -> None:
    places = Places()
    assert places.block_number("layers.12") == 12
    assert places.block_number("transformer.h.3") == 3
    assert places.block_number("layers.3.attention") is None
    assert places.block_number("layers.3.experts.7") is None
    assert places.block_of("layers.3.attention.output.weight") == "layers.3"
    assert places.block_of("layers.3.experts.7.up.weight") == "layers.3"
    assert places.block_of("embedding.weight") == "embedding.weight"
    names = ["embedding.weight", "model.embed_tokens.weight", "transformer.wte.weight", "shared.weight"]
    assert all(map(places.is_embedding, names))
    others = ["transformer.wpe.weight", "embedding_norm.weight", "position_embedding", "layers.0"]
    assert not any(map(places.is_embedding, others))
    told = Places({"stacks": {"encoder.block": ["encoder.block.0"], "decoder.block": ["decoder.block.0"]}})
    assert told.block_of("decoder.block.0.layer.1.EncDecAttention.q:input") == "decoder.block.0"
    assert told.stack_of("encoder.block.0.layer.0.SelfAttention.q") == "encoder.block"
    assert (
        told.block_number("decoder.block.7") == 7
    )  # of a stack of which this rank holds the first block only
    assert told.block_number("encoder.block.0.layer.1") is None
