"""Acceptance on GPUs: every check and measurement that only GPUs can make, in one command.

    scripts/gpu_acceptance.sh [--steps NAME,NAME] [--list] [--output FOLDER]

- `machine`: the GPUs and versions
- `steps`: the checks and measurements, each a few programs
- `programs`: runs a step's programs, with logs and a time limit
- `report`: the page and the JSON of a machine
"""
