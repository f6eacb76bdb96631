"""The caches of all layers: changed as a whole or not at all, whatever interrupts."""

import sys

import pytest
import torch
from tiny import create_kv_caches, tiny_gpt

from litgpt.engine.loading import choose_kv_caches
from litgpt.kvcache import CacheSpec
from litgpt.kvcache.layers import LayerCaches

IDX = torch.arange(3, 15)[None]


class Interrupt(BaseException):
    pass


def interrupted_after(count, function):
    """Calls `function`, and interrupts it after `count` lines of Python. Returns whether it was."""
    left = count

    def trace(frame, event, arg):
        nonlocal left
        if "litgpt" not in frame.f_code.co_filename:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise Interrupt
        return trace

    sys.settrace(trace)
    try:
        function()
    except Interrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def works(model, expected):
    """Whatever caches the model has, or default ones if it has none, give the right logits."""
    attached = [block.attn.kv_cache for block in model.transformer.h]
    if not model.are_kv_caches_assigned():
        model.set_kv_caches(1)
    with torch.no_grad():
        found = torch.cat((model(IDX[:, :7], 0), model(IDX[:, 7:], 7)), 1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert [block.attn.kv_cache for block in model.transformer.h] == model.kv_caches(), attached


@pytest.mark.parametrize("what", ["assign", "set", "choose", "clear", "exchange"])
def test_an_interrupt_at_any_point_leaves_all_caches_or_none(what):
    for count in range(1, 4000, 7):
        model = tiny_gpt()
        with torch.no_grad():
            expected = model(IDX)
        caches = create_kv_caches("lastrec", model.config, 1, 20)
        if what in ("clear", "exchange"):
            model.set_kv_caches(1)
        do = {
            "assign": lambda model=model, caches=caches: model.assign_kv_caches(caches),
            "set": lambda model=model: model.set_kv_caches(1),
            "choose": lambda model=model: choose_kv_caches(model, CacheSpec("lastrec", cache_length=20)),
            "clear": lambda model=model: model.clear_kv_caches(),
            "exchange": lambda model=model, caches=caches: model.exchange_kv_caches(LayerCaches(caches)),
        }[what]
        interrupted = interrupted_after(count, do)
        works(model, expected)
        if not interrupted:
            return
    pytest.fail("it never ended")


@pytest.mark.parametrize("what", ["call", "reorder", "rewind", "crop"])
def test_an_interrupted_change_leaves_all_caches_changed_as_they_were_or_empty(what):
    for count in range(1, 20000, 11):
        model = tiny_gpt()
        with torch.no_grad():
            expected = model(IDX)
            model.set_kv_caches(2)
            model(IDX[:, :9], 0)

            def do(model=model):
                if what == "call":
                    model(IDX[:, 9:10], 9)
                else:
                    argument = {"reorder": [0, 0], "rewind": [2], "crop": 4}[what]
                    getattr(model.caches, what)(argument)

            interrupted = interrupted_after(count, do)
            lengths = model.caches.row_lengths
            assert {cache.row_lengths for cache in model.kv_caches()} == {lengths}
            if lengths:
                position, rows = lengths[0], len(lengths)
                found = model(IDX[:, position : position + 1].expand(rows, 1), position)
                torch.testing.assert_close(
                    found, expected[:, position : position + 1].expand(rows, 1, -1), atol=1e-4, rtol=1e-4
                )
            works(model, expected)
        if not interrupted:
            return
    pytest.fail("it never ended")


def test_a_change_that_the_first_cache_refuses_changes_nothing():
    model = tiny_gpt()
    model.set_kv_caches(2)
    with torch.no_grad():
        model(IDX, 0)
        for refused in (
            lambda: model.caches.rewind([13]),
            lambda: model.caches.reorder([1]),
            lambda: model.caches.extend(5),
        ):
            with pytest.raises(ValueError, match=r"\d"):
                refused()
            assert model.next_token_pos == IDX.shape[1]


def test_without_caches_a_call_says_what_to_do():
    with pytest.raises(ValueError, match="set_kv_caches or assign_kv_caches"):
        tiny_gpt()(IDX, 0)
