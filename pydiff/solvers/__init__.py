"""Solvers: host arithmetic that compiles to plans. One file a family; importing it registers its names.

A new family is a new file here (add it to the import below) and one test file.
"""

from pydiff.solvers import ancestral, ddpm, dpm_solver, dpmpp, euler, euler_maruyama, unipc
from pydiff.solvers.registry import Solver, get_solver, list_solvers, solver

__all__ = [
    "Solver",
    "get_solver",
    "list_solvers",
    "solver",
    "ancestral",
    "ddpm",
    "dpm_solver",
    "dpmpp",
    "euler",
    "euler_maruyama",
    "unipc",
]
