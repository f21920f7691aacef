"""A run's configuration for TensorBoard's HParams page, which compares runs."""

from collections.abc import Mapping

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.plugin_data_pb2 import (
    HParamsPluginData,
    SessionEndInfo,
    SessionStartInfo,
)

from switchtitan.observability.sinks import HParam


def start_summary(values: Mapping[str, HParam]) -> Summary:
    """Returns the summary that makes a run a session with these values.

    `SummaryWriter.add_hparams` would make a run folder of its own. There is no summary of an
    experiment: the page takes the keys of the first one that it finds, which runs of other methods
    do not have.
    """
    start = SessionStartInfo()
    for key, value in values.items():
        if isinstance(value, bool):
            start.hparams[key].bool_value = value
        elif isinstance(value, str):
            start.hparams[key].string_value = value
        else:
            start.hparams[key].number_value = value
    return _summary(metadata.SESSION_START_INFO_TAG, session_start_info=start)


def end_summary(is_finished: bool) -> Summary:
    """Returns the summary that ends a session."""
    status = Status.Value("STATUS_SUCCESS" if is_finished else "STATUS_FAILURE")
    return _summary(metadata.SESSION_END_INFO_TAG, session_end_info=SessionEndInfo(status=status))


def _summary(tag: str, **content: SessionStartInfo | SessionEndInfo) -> Summary:
    data = HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, **content)
    plugin = SummaryMetadata.PluginData(
        plugin_name=metadata.PLUGIN_NAME, content=data.SerializeToString()
    )
    value = Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin))
    return Summary(value=[value])
