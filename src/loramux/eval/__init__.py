"""Evaluation: ranking, greedy answers, BLEU, and a model for lm-evaluation-harness.

loramux.eval.run.evaluate(base, adapter, data)     loads and scores
loramux.eval.run.evaluate_model(model, tokenizer, rows_by_task)
loramux.eval.generate.generate(base, adapter, prompts)
loramux.eval.harness                               importing it registers `--model loramux`
"""
