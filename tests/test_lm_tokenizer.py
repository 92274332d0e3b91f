"""The tokenizer's hash is equal exactly when texts become the same ids."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from crosslens.lm import tokenizer_hash
from tests.conftest import build_tiny_tokenizer


@pytest.fixture
def own():
    """One that a test may change."""
    return build_tiny_tokenizer()


def with_definition(tokenizer, change):
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    change(raw)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(raw)))


def test_saving_and_loading_keeps_it(tiny_tokenizer, tiny_model_folder):
    again = AutoTokenizer.from_pretrained(tiny_model_folder)
    assert tokenizer_hash(again) == tokenizer_hash(tiny_tokenizer)
    assert len(tokenizer_hash(again)) == 64


def test_what_a_chat_version_changes_does_not_matter(tiny_tokenizer, own):
    own.chat_template = "{{ messages }}"
    own.eos_token = "<pad>"
    own.padding_side = "left"
    own(["a", "a longer one"], padding=True, truncation=True, max_length=4)
    assert tokenizer_hash(own) == tokenizer_hash(tiny_tokenizer)


def test_an_added_token_matters(tiny_tokenizer, own):
    own.add_tokens([AddedToken("def ")])
    assert own("def f")["input_ids"] != tiny_tokenizer("def f")["input_ids"]
    assert tokenizer_hash(own) != tokenizer_hash(tiny_tokenizer)


def test_one_merge_matters(tiny_tokenizer, own):
    fewer = with_definition(own, lambda raw: raw["model"]["merges"].pop())
    assert tokenizer_hash(fewer) != tokenizer_hash(tiny_tokenizer)


def test_the_order_of_the_vocabulary_matters(tiny_tokenizer, own):
    def swap(raw):
        vocabulary = raw["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    assert tokenizer_hash(with_definition(own, swap)) != tokenizer_hash(tiny_tokenizer)


def test_splitting_before_the_merges_matters(tiny_tokenizer, own):
    def change(raw):
        raw["pre_tokenizer"]["add_prefix_space"] = True

    assert tokenizer_hash(with_definition(own, change)) != tokenizer_hash(tiny_tokenizer)


def test_tokenizers_without_a_fast_backend(tiny_tokenizer):
    class Slow:
        def __init__(self, vocabulary):
            self.vocabulary = vocabulary

        def get_vocab(self):
            return self.vocabulary

        def get_added_vocab(self):
            return {}

    one, other = Slow({"a": 0, "b": 1}), Slow({"b": 1, "a": 0})
    assert tokenizer_hash(one) == tokenizer_hash(other)
    assert tokenizer_hash(one) != tokenizer_hash(Slow({"a": 1, "b": 0}))
