"""Random examples that a tiny model learns something from: answers use four letters only."""

import torch

from loramux.data import Example

FIRST_LETTER, VOCAB, ANSWERS = 7, 96, 4


def examples(num: int, seed: int = 0) -> list[Example]:
    """Prompts of 3 to 11 tokens with an answer of 1 to 4."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    made = []
    for _ in range(num):
        prompt, answer = draw(3, 12), draw(1, 5)
        ids = [draw(FIRST_LETTER, VOCAB) for _ in range(prompt)]
        ids += [draw(FIRST_LETTER, FIRST_LETTER + ANSWERS) for _ in range(answer)]
        made.append(Example.build("toy", ids, [False] * prompt + [True] * answer))
    return made


def pairs(num: int, seed: int = 0) -> list[Example]:
    """Chosen and rejected by turns: answers of the first two of the four letters, and of the other two."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    made = []
    for _ in range(num):
        prompt = [draw(FIRST_LETTER, VOCAB) for _ in range(draw(3, 12))]
        for first in (FIRST_LETTER, FIRST_LETTER + 2):
            answer = [draw(first, first + 2) for _ in range(draw(1, 5))]
            mask = [False] * len(prompt) + [True] * len(answer)
            made.append(Example.build("toy", prompt + answer, mask))
    return made
