"""Runs that break the rules about exports and tasks, as test_config_rules has them for all others."""

UL2, CHECKPOINT, EVAL = "raptr_ds.model.architecture=ul2", "raptr_ds.checkpoint.", "raptr_ds.eval."
EXPORTS = f"{CHECKPOINT}interval=10 {CHECKPOINT}export_interval=20"
TASKS = f'{EVAL}tasks=["boolq","copa"]'
SCORED = f"{UL2} {EXPORTS} {TASKS}"

EXPORT_RULES: dict[str, list[tuple[int, str, list[str], str]]] = {
    "exports_have_checkpoints": [
        (1, f"{CHECKPOINT}export_interval=20", ["export_interval=20", ".interval=0", "Set interval to 20"], EXPORTS),
        (
            1,
            f"{CHECKPOINT}interval=10 {CHECKPOINT}export_interval=25",
            ["export_interval=25", "multiple of", "interval=10", "Set export_interval to 30, or interval to 5"],
            EXPORTS,
        ),
    ],
    "task_keys_have_tasks": [
        (
            1,
            f"{CHECKPOINT}export_precision=bf16",
            [
                "export_precision='bf16'",
                "has no use with raptr_ds.checkpoint.export_interval=0",
                "to a number of steps",
            ],
            f"{EXPORTS} {CHECKPOINT}export_precision=bf16",
        ),
        (
            1,
            f"{EVAL}task_limit=5 {EVAL}task_shots=1",
            ["raptr_ds.eval.task_shots=1", "raptr_ds.eval.task_limit=5", "has no use with raptr_ds.eval.tasks=[]"],
            f"{SCORED} {EVAL}task_limit=5 {EVAL}task_shots=1",
        ),
    ],
    "tasks_are_scored_on_exports": [
        (1, f"{UL2} {EXPORTS} {EVAL}tasks=boolq", ["tasks='boolq'", 'must be a list, as ["boolq", "copa"].'], SCORED),
        (
            1,
            f"{EXPORTS} {TASKS}",
            ["raptr_ds.eval.tasks=['boolq', 'copa']", "architecture='bert'", "no continuations"],
            SCORED,
        ),
        (1, f"{UL2} {TASKS}", ["tasks are scored on exports", "export_interval=0"], SCORED),
        (1, f'{UL2} {EXPORTS} {EVAL}tasks=["copa","copa"]', ["names copa twice"], SCORED),
        (
            1,
            f"{SCORED} {EVAL}task_interval=30",
            ["task_interval=30", "export_interval=20", "Set task_interval to 40"],
            f"{SCORED} {EVAL}task_interval=40",
        ),
    ],
}
