"""Tasks: problems to decode and the judges of their answers.

The families of the built-in model (`built_in`), public test sets (`gsm8k`, `humaneval`) and files of one's
own (`jsonl`), all by name in `registry`.
"""

from blockbatch.tasks.built_in import FAMILIES, built_in_problems
from blockbatch.tasks.jsonl import parse_problems
from blockbatch.tasks.problem import Problem
from blockbatch.tasks.registry import TASKS, load_task

__all__ = ["FAMILIES", "TASKS", "Problem", "built_in_problems", "load_task", "parse_problems"]
