"""The project's measuring instrument: variant and reference interleaved in one process, intervals, a control."""
