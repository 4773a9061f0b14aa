"""A digest of a dataset."""

from __future__ import annotations

from collections.abc import Sequence

from grao_fast.data.examples import Example, Examples
from grao_fast.data.streaming import StreamedExamples
from grao_fast.system.digests import digest_rows

_EXAMPLES = 10_000  # that are read for their digest


def fingerprint(examples: Sequence[Example] | StreamedExamples) -> str:
    """A digest of prompts, references and columns, by which a run that resumes knows its dataset.

    Token ids do not enter: a chat template may write today's date. See `digest_rows`. A large
    dataset that is read as it is drawn counts by its bytes, in the format that it has; a streaming
    one by its features and first rows.
    """
    if isinstance(examples, StreamedExamples):
        return examples.digest()
    if isinstance(examples, Examples) and len(examples) > _EXAMPLES:
        return examples.digest()
    return digest_rows((e.prompt, e.reference, e.columns) for e in examples)
