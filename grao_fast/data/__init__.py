"""Data: from a source to packed micro-batches.

Users import `Example` and `load_examples`, also from `grao_fast` itself. The modules, in order:
`sources` and `files` give `rows`, which stay where they are; `fields` and `examples` give examples,
`chat`, `encoder` and `encoding` give token ids, `prompts` and `streaming` draw them by the `sizes`
of texts, `decoding` gives the text that is scored, `packing` gives micro-batches.
"""

from grao_fast.data.examples import Example, load_examples

__all__ = ["Example", "load_examples"]
