"""Token ids of sentences, remembered word by word where that gives the same ids."""

import itertools
import json
import re
import string
from array import array
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer

MAX_KNOWN_CHARACTERS = 2**21  # about 250,000 words, 60 MB; the memory is emptied when it is full
ONE_CHARACTER = re.compile(r"\[(\\.|[^\]\\])+\]", re.DOTALL)  # a regular expression that is one character class
LOCAL_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents"}
SEPARATORS = re.compile("[\x1c-\x1f]")  # white space for str.split, but not for the tokenizers library
COMMON_CHARACTERS = "".join(map(chr, range(0x410, 0x450))) + "Ёё" + string.ascii_letters + string.digits
COMMON_CHARACTERS += string.punctuation + "«»—–…„“”’№"


def list_parts(description: dict | None, name: str) -> list[dict]:
    """The members of a sequence of normalizers or pre-tokenizers, or the single one."""
    if description is None:
        return []
    return description[name] if description["type"] == "Sequence" else [description]


def is_local_normalizer(description: dict) -> bool:
    """Whether it changes a word of a text as it would change the word alone."""
    kind = description["type"]
    if kind != "Replace":
        return kind in LOCAL_NORMALIZERS
    pattern = description["pattern"]
    if "String" in pattern:
        return not any(character.isspace() for character in pattern["String"])
    return pattern["Regex"] == " {2,}" or ONE_CHARACTER.fullmatch(pattern["Regex"]) is not None


def words_are_independent(pipeline: dict) -> bool:
    """Whether the ids of a text are those of its words, split at white space, one after the other.

    pipeline: the content of a tokenizer.json. True for those made of parts that are known to be local, as our own
    tokenizers and the published one are.
    """
    pre_tokenizers = list_parts(pipeline["pre_tokenizer"], "pretokenizers")
    return (
        [each["type"] for each in pre_tokenizers] == ["WhitespaceSplit", "Metaspace"]
        and pre_tokenizers[1].get("prepend_scheme") == "always"
        and all(map(is_local_normalizer, list_parts(pipeline["normalizer"], "normalizers")))
        and not any(len(token["content"].split()) != 1 for token in pipeline["added_tokens"])
        and not pipeline["model"].get("dropout")
    )


def find_plain_characters(tokenizer: Tokenizer, pipeline: dict) -> str:
    """Characters whose words the normalizer leaves alone and that begin no special token inside of a word."""
    touched = {token["content"][0] for token in pipeline["added_tokens"]}
    for normalizer in list_parts(pipeline["normalizer"], "normalizers"):
        touched.update(normalizer.get("pattern", {}).get("String", ""))
    return "".join(
        character
        for character in COMMON_CHARACTERS
        if character not in touched
        and (tokenizer.normalizer is None or tokenizer.normalizer.normalize_str(character) == character)
    )


def split_words(sentence: str) -> list[str]:
    if not sentence.isprintable() and SEPARATORS.search(sentence):
        return [sentence]  # encoded as a whole
    return sentence.split()


class SentenceEncoder:
    """Encodes sentences without special tokens, each to an array of ids.

    Running text repeats its words, so a look into a dictionary replaces most of the tokenizer's work. A new word of
    plain characters goes to the tokenizer's model directly: what stands before it in the pipeline would only put "▁" in
    front of it, and takes longer than the model. The ids are those of the tokenizer; where its words depend on their
    neighbours, it gets the whole sentences.
    """

    def __init__(self, tokenizer: Tokenizer):
        pipeline = json.loads(tokenizer.to_str())
        self.tokenizer, self.model = tokenizer, tokenizer.model  # raw: no padding, no truncation
        self.by_words = words_are_independent(pipeline)
        self.known: dict[str, bytes] = {}  # word -> its ids, int32
        self.num_characters = 0
        if self.by_words:
            self.word_start = list_parts(pipeline["pre_tokenizer"], "pretokenizers")[1]["replacement"]
            self.plain_word = re.compile(f"[{re.escape(find_plain_characters(tokenizer, pipeline))}]+")

    def encode(self, sentences: Sequence[str]) -> list[array]:
        if not self.by_words:
            return [array("i", ids) for ids in self._encode_whole(sentences)]
        if self.num_characters > MAX_KNOWN_CHARACTERS:
            self.known, self.num_characters = {}, 0
        rows = [split_words(sentence) for sentence in sentences]
        self._learn(set(itertools.chain.from_iterable(rows)).difference(self.known))
        find = self.known.__getitem__
        return [array("i", b"".join(map(find, row))) for row in rows]

    def _learn(self, words: set[str]) -> None:
        tokenize, is_plain = self.model.tokenize, self.plain_word.fullmatch
        others = []
        for word in words:
            if is_plain(word):
                self.known[word] = array("i", [token.id for token in tokenize(self.word_start + word)]).tobytes()
            else:
                others.append(word)
        for word, ids in zip(others, self._encode_whole(others), strict=True):
            self.known[word] = array("i", ids).tobytes()
        self.num_characters += sum(map(len, words))

    def _encode_whole(self, texts: Sequence[str]) -> Iterable[list[int]]:
        return (encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False))
