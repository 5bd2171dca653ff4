"""The word-level tokenizer of the demo language model.

Words are split at whitespace and at `. ? , + =`. A four-digit year becomes two tokens (`1732` -> `17 32`), while the
numbers 0 to 198 stay whole. Names with a space (`New Mexico`) are one token each. Case matters.
"""

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from replacement.demo.corpus.behaviours import BOS, PAD, SPECIAL_TOKENS, UNK, vocabulary

_PUNCTUATION = Regex(r"[.?,+=]")
_CENTURY = Regex(r"(?<!\d)\d{2}(?=\d{2}(?!\d))")


def build_tokenizer(context: int = 64) -> PreTrainedTokenizerFast:
    """The tokenizer of the demo model, built from the vocabulary of its corpus.

    `<bos>` is put in front only where special tokens are asked for (`add_special_tokens=True`).

    Args:
        context: longest row the model reads, `<bos>` included.
    """
    tokens = vocabulary()
    ids = {token: i for i, token in enumerate(tokens)}
    core = Tokenizer(WordLevel(ids, unk_token=UNK))
    core.pre_tokenizer = Sequence([WhitespaceSplit(), Split(_PUNCTUATION, "isolated"), Split(_CENTURY, "isolated")])
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    # An added token is looked for before the text is split at spaces; `single_word` keeps it from matching in a word.
    core.add_tokens([AddedToken(token, single_word=True) for token in tokens if " " in token])
    core.post_processor = TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        unk_token=UNK,
        pad_token=PAD,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
