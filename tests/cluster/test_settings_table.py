from rich.console import Console

from cluster.settings_table import settings_table


def test_a_section_is_explained_with_its_defaults():
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(settings_table("grpo.optimizer"))
    text = console.export_text()
    assert "grpo.optimizer.learning_rate" in text and "Peak learning rate." in text
    assert "grpo.steps" not in text


def test_all_settings_are_there():
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(settings_table(""))
    text = console.export_text()
    for name in ("name", "sft.steps", "rollout.max_model_len", "reward.code.cpu_s"):
        assert f" {name} " in text
