"""A sentencepiece Unigram model (`spiece.model`) as an equal pipeline of the tokenizers library."""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # sentencepiece_model.proto, SentencePiece.Type
UNIGRAM = 1  # sentencepiece_model.proto, TrainerSpec.ModelType
ALWAYS, NEVER = 1e3, -1e6  # scores with which a piece is part of the best segmentation whenever it can be, or never


def read_model(path: Path):
    """The parsed protobuf message. ValueError when the file is not a model this module can convert."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path} is not a sentencepiece model ({error}); copy or download the file again") from error
    if not model.pieces:
        raise ValueError(f"{path} is not a sentencepiece model (it holds no pieces); copy or download the file again")
    if model.trainer_spec.model_type != UNIGRAM or model.trainer_spec.treat_whitespace_as_suffix:
        raise ValueError(
            f"{path} is not a Unigram model with whitespace at the start of words (model_type="
            f"{model.trainer_spec.model_type}, treat_whitespace_as_suffix="
            f"{model.trainer_spec.treat_whitespace_as_suffix}); convert it to a tokenizer.json and pass that directory"
        )
    return model


def piece_scores(model) -> list[tuple[str, float]]:
    """(piece, score) in the order of the ids. A user-defined symbol is always taken, unused and byte pieces never."""
    fixed = {USER_DEFINED: ALWAYS, UNUSED: NEVER, BYTE: NEVER}
    return [(piece.piece, fixed.get(piece.type, piece.score)) for piece in model.pieces]


def keep_user_symbols(model, normalizer: normalizers.Normalizer) -> normalizers.Normalizer:
    """Leave user-defined symbols as they are, which sentencepiece never normalises (№ would become No).

    During the normalisation a private character stands for each. Added tokens, which the library takes out of a text
    before it normalises the rest, would not do: each piece of the rest would get a ▁ and lose its outer blanks.
    """
    taken = {character for piece in model.pieces for character in piece.piece}
    stand_ins = (chr(code) for code in range(0x10F000, 0x10FFFE) if chr(code) not in taken)
    symbols = [piece.piece.replace("▁", " ") for piece in model.pieces if piece.type == USER_DEFINED]
    # the longest that matches counts; of the thousands some models have, only those that would be changed
    changed = sorted((text for text in symbols if is_changed(normalizer, text)), key=len, reverse=True)
    pairs = list(zip(changed, stand_ins, strict=False))
    hide = [normalizers.Replace(symbol, stand_in) for symbol, stand_in in pairs]
    show = [normalizers.Replace(stand_in, symbol.replace(" ", "▁")) for symbol, stand_in in pairs]
    return normalizers.Sequence([*hide, normalizer, *show]) if pairs else normalizer


def is_changed(normalizer: normalizers.Normalizer, symbol: str) -> bool:
    """Between two letters: blanks at the ends of a text are another matter."""
    return normalizer.normalize_str(f"x{symbol}x").lstrip("▁") != f"x{symbol}x".replace(" ", "▁")


def build_normalizer(model, *, lower_case: bool, strip_accents: bool) -> normalizers.Normalizer:
    """The normalisation stored in the model, then blanks removed and written as ▁ the way sentencepiece does it."""
    spec = model.normalizer_spec
    steps = []
    if strip_accents:
        steps += [normalizers.NFKD(), normalizers.StripAccents()]
    if lower_case:
        steps.append(normalizers.Lowercase())
    if "nfkc" in spec.name:
        # Precompiled loses a mark on a letter that has two (и + breve + stress); composed, the letter has one.
        steps.append(normalizers.NFC())
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +|[ ▁]+\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps.append(normalizers.Replace(" ", "▁"))
    if spec.add_dummy_prefix:
        # Not Metaspace's own prefix: it leaves out the ▁ before a text that begins with one, sentencepiece does not.
        steps.append(normalizers.Prepend("▁"))
    return keep_user_symbols(model, normalizers.Sequence(steps))


def convert_sentencepiece(path: Path, *, lower_case: bool = False, strip_accents: bool = False) -> Tokenizer:
    """A tokenizer whose ids for a text equal those of the sentencepiece library.

    Only the model's own normalisation is applied unless `lower_case` or `strip_accents` ask for more before it. Control
    pieces and <unk> become special tokens, found in a text as such (sentencepiece itself would spell them out);
    "[MASK]" takes the blank on its left with it. No post-processor is set.

    Rare differences remain. sentencepiece adds scores in single precision along the whole text, so of two segmentations
    that are equally good to six digits it may take the other one. The Rust library drops an accent on a character that
    the normalisation rewrites (² with a breve).
    """
    model = read_model(path)
    pieces = piece_scores(model)
    unknown_id = next(index for index, piece in enumerate(model.pieces) if piece.type == UNKNOWN)
    byte_fallback = model.trainer_spec.byte_fallback
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=unknown_id, byte_fallback=byte_fallback))
    tokenizer.normalizer = build_normalizer(model, lower_case=lower_case, strip_accents=strip_accents)
    # Words can be segmented one by one, which is faster, if no piece reaches over a blank.
    split = not any("▁" in piece[1:] for piece, _ in pieces)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=split)
    prepend_scheme = "always" if model.normalizer_spec.add_dummy_prefix else "never"
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme=prepend_scheme)
    if byte_fallback:
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), tokenizer.decoder])
    tokenizer.add_special_tokens(
        [
            AddedToken(piece.piece, lstrip=piece.piece == "[MASK]", normalized=False, special=True)
            for piece in model.pieces
            if piece.type in (CONTROL, UNKNOWN)
        ]
    )
    return tokenizer
