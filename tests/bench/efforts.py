"""The least that still runs every branch of the benchmarks: a pico shape, two or three rounds."""

from loramux.bench.shape import Effort, Shape

PICO = Shape("pico", layers=2, width=32, inner=48, heads=4, kv_heads=2, vocab=96)
TINY = Effort(
    PICO,
    decode_rounds=3,
    close_rounds=4,
    load_rounds=2,
    train_rounds=2,
    memory_runs=0,
    steps=2,
    context=8,
    batches=(1, 2),
    train_batch=2,
    train_length=8,
    joint_rounds=2,
    joint_steps=4,
    engine_rounds=2,
    engine_shapes=((1, 24), (8, 24)),
    prefill_rounds=2,
    prefill_shape=(2, 12),
    mixed=1,
    mixed_context=24,
    slot_rounds=2,
    residency=(1, 3, 9),
    serve_rounds=2,
    open_rounds=1,
    serve_requests=6,
    serve_adapters=4,
    serve_slots=3,
    serve_prompt=(4, 9),
    serve_answer=(2, 5),
    streams=3,
    score_rounds=2,
    score_layers=(3,),
)
