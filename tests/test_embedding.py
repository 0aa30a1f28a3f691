"""New tokens as rows: the table is never touched, ids map both ways, a merge puts rows in place."""

import math

import pytest
import torch
from conftest import tiny_model

from minilora.lora import merge


@pytest.fixture(params=["append", "reserved"])
def model(request):
    model = tiny_model("gemma2")
    ids = [512, 513, 514] if request.param == "append" else [40, 7, 300]
    model.embed_tokens.add_rows(ids, torch.randn(3, 72, generator=torch.Generator().manual_seed(0)))
    return model


@torch.no_grad()
def test_the_table_is_one_tensor_and_stays_where_it_is():
    model = tiny_model("gemma2")
    table = model.embed_tokens.weight
    place, version = table.data_ptr(), table._version
    model.embed_tokens.add_rows([512, 513], torch.zeros(2, 72))
    model(torch.tensor([[1, 513, 5]]))
    merge(model)
    assert model.embed_tokens.weight is table and table.data_ptr() == place
    assert table.shape == (512, 72) and table._version == version


@torch.no_grad()
def test_encode_and_decode_use_the_rows(model):
    """Against a plain table that was resized by hand."""
    table = model.embed_tokens
    plain = torch.cat([table.weight, torch.zeros(table.appended, 72)])
    plain[table.row_ids] = table.rows
    ids = torch.tensor([[0, 511, 40, 7, 300, int(table.row_ids[1]), int(table.row_ids[2])]])
    torch.testing.assert_close(table.encode(ids), plain[ids] * math.sqrt(72), rtol=0, atol=0)
    hidden = torch.randn(2, 3, 72)
    torch.testing.assert_close(table.decode(hidden), hidden @ plain.T)
    assert table.num_embeddings == len(plain) == table.decode(hidden).shape[-1]


def test_gradient_reaches_only_the_rows_that_were_used(model):
    """As input: an id that does not occur has no gradient. The table has none at all."""
    table = model.embed_tokens
    used = int(table.row_ids[1])
    table.encode(torch.tensor([[3, used, used]])).sum().backward()
    assert table.weight.grad is None
    torch.testing.assert_close(table.rows.grad[1], torch.full((72,), 2 * math.sqrt(72)))
    assert not table.rows.grad[[0, 2]].any()


@torch.no_grad()
def test_merge_puts_rows_in_place(model):
    ids = torch.tensor([[1, *model.embed_tokens.row_ids.tolist(), 5]])
    before = model(ids)
    merge(model)
    assert torch.equal(model(ids), before)
    table = model.embed_tokens
    if table.reserved:
        assert torch.equal(table.weight[table.row_ids], table.rows)


def test_scale_is_rounded_to_the_tables_dtype():
    """√3584 is 59.866; in bfloat16 it is 59.75, and Gemma was trained with that."""
    model = tiny_model("gemma2", hidden_size=3584, intermediate_size=8, num_hidden_layers=1,
                       vocab_size=16, dtype=torch.bfloat16)
    ids = torch.tensor([3])
    expected = model.embed_tokens.weight[3] * torch.tensor(59.75, dtype=torch.bfloat16)
    assert torch.equal(model.embed_tokens.encode(ids)[0], expected)


@torch.no_grad()
def test_rows_start_from_the_mean_of_their_description():
    table = tiny_model("gemma2").embed_tokens
    start = table.start([[5, 9, 9], []])
    torch.testing.assert_close(start[0], (table.weight[5] + 2 * table.weight[9]) / 3)
    torch.testing.assert_close(start[1], table.weight.mean(0))


@pytest.mark.parametrize("ids", [[], [513, 514], [511, 512], [512, 512], [3, 3], [-1, 4]])
def test_ids_that_are_neither_after_nor_inside_the_table(ids):
    table = tiny_model("gemma2").embed_tokens
    with pytest.raises(ValueError, match="rows for ids"):
        table.add_rows(ids, torch.zeros(len(ids), 72))
    assert table.rows is None


def test_rows_are_added_once_and_with_the_tables_width():
    table = tiny_model("gemma2").embed_tokens
    with pytest.raises(ValueError, match="shape"):
        table.add_rows([512], torch.zeros(1, 71))
    table.add_rows([512], torch.zeros(1, 72))
    with pytest.raises(ValueError, match="rows for ids"):
        table.add_rows([513], torch.zeros(1, 72))
