from __future__ import annotations

import logging
from collections.abc import Mapping

from proxy.errors import UpstreamError
from proxy.storage.models import ModelRecord
from proxy.upstream.sse import encode_json

log = logging.getLogger("uniroute.upstream")

_REFUSING = frozenset({400, 422, 500, 501})


class StreamOptions:
    """As a model's `supports_stream_options` states it, else as the model itself has shown. One per process."""

    def __init__(self) -> None:
        self._refused: dict[str, ModelRecord] = {}

    def are_sent_to(self, record: ModelRecord) -> bool:
        stated = record.info.supports_stream_options
        return self._refused.get(record.name) is not record if stated is None else stated

    def are_in_doubt(self, record: ModelRecord, failure: UpstreamError) -> bool:
        """Whether `failure` is about them, so that the model is to be asked once more without."""
        in_doubt = record.info.supports_stream_options is None and self.are_sent_to(record)
        return in_doubt and failure.status in _REFUSING and _names_them(failure)

    def were_refused(self, record: ModelRecord) -> None:
        """And without them the model answered. A record that is changed is asked anew."""
        log.warning(
            "model %s refuses stream_options: it is asked without, and its usage is estimated where it reports none"
            " (model_info: supports_stream_options: false)",
            record.name,
        )
        self._refused[record.name] = record

    def retain(self, models: Mapping[str, ModelRecord]) -> None:
        self._refused = {name: record for name, record in self._refused.items() if models.get(name) is record}


def _names_them(failure: UpstreamError) -> bool:
    said = failure.body if isinstance(failure.body, bytes) else encode_json({"": failure.body})
    return b"stream_options" in said or b"include_usage" in said
