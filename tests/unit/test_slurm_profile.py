"""The profile of a cluster: what is read of it, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.slurm import profile_docs
from launch.slurm.profile import FOLDER, Profile, read_profile
from sft_dist.errors import UserError
from tests.recipes import ROOT

EXAMPLES = sorted(FOLDER.glob("*.yaml"))


def read(folder: Path, text: str) -> Profile:
    (folder / "c.yaml").write_text(text)
    return read_profile(folder / "c.yaml")


def fault(folder: Path, text: str) -> str:
    with pytest.raises(UserError) as error:
        read(folder, text)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{folder}/")


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_the_examples_are_profiles_that_explain_themselves(file: Path) -> None:
    profile = read_profile(file)
    assert profile.partition and profile.time_minutes >= 60
    assert file.read_text().startswith("# ")
    assert all(len(line) <= 110 for line in file.read_text().splitlines())
    # They are copied to clusters whose folders are not known here.
    assert profile.shared_folder is None


def test_there_are_examples_for_the_usual_machines() -> None:
    assert [file.stem for file in EXAMPLES] == ["a100", "cpu", "h100"]
    gpus = read_profile(FOLDER / "h100.yaml").gpus()
    assert len(gpus) == 8 and gpus[0].compute_capability == (9, 0) and gpus[0].memory_bytes == 80 * 2**30


def test_a_profile_may_be_empty_but_for_what_it_says(tmp_path: Path) -> None:
    assert read(tmp_path, "partition: gpu\n") == Profile(partition="gpu")


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("1:30:00", 90), ('"1:30"', 1.5), ("1-0:0:0", 1440), ("2-12", 3600), ("0:00:30", 0.5)],
)
def test_a_time_is_written_as_slurm_takes_it(tmp_path: Path, text: str, minutes: float) -> None:
    assert read(tmp_path, f"time: {text}\n").time_minutes == minutes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("partitoin: gpu\n", "c.yaml:1: partitoin: no such key, did you mean partition"),
        ("\nrequeue:\n  maxx: 3\n", "c.yaml:3: requeue.maxx: no such key, did you mean max"),
        ("gpus_per_node: many\n", "c.yaml:1: gpus_per_node: should be a valid integer"),
        ("nodes: 0\n", "c.yaml:1: nodes: should be greater than 0"),
        ("time: never\n", "c.yaml:1: time: 'never' is no time; write D-HH:MM:SS, HH:MM:SS or minutes"),
        ("time: 0\n", "c.yaml:1: time: 0 is no time"),
        ("time: true\n", "c.yaml:1: time: True is no time"),
        ("signal_seconds: 5\n", "c.yaml:1: signal_seconds: should be greater than or equal to 30"),
        ("container: {mounts: []}\n", "c.yaml:1: container.image: is missing; give it a value"),
        ("setup: module load cuda\n", "c.yaml:1: setup: should be a valid list"),
        ("setup: ['a\n\n    b']\n", "c.yaml:1: setup: a line holds a line break; make it two"),
        ("environment: {A: null}\n", "c.yaml:1: environment: A should be one word"),
        ("environment: {A: [1]}\n", "c.yaml:1: environment: A should be one word"),
        ("environment: {'A; ls': 1}\n", "c.yaml:1: environment: 'A; ls' is no name of a variable"),
        ("sbatch: {--mail-type: END}\n", "c.yaml:1: sbatch: '--mail-type' is no option of sbatch; write its long name"),
        ("sbatch: {time: 5}\n", "c.yaml:1: sbatch: time has a key of its own here: set time"),
        ("sbatch: {mem: 5G}\n", "c.yaml:1: sbatch: mem has a key of its own here: set memory_per_node"),
        ("sbatch: {comment: mine}\n", "c.yaml:1: sbatch: comment is set by sft-dist itself; leave it out"),
        ("- gpu\n", "c.yaml: holds no keys; name the profile of a cluster"),
        ("", "c.yaml: holds no keys; name the profile of a cluster"),
    ],
)
def test_a_fault_is_one_line_with_file_line_key_and_mend(tmp_path: Path, text: str, said: str) -> None:
    assert said in fault(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        "environment: {WANDB_API_KEY: abc}\n",
        "environment: {HF_TOKEN: hf_abc}\n",
        "environment: {db_password: abc}\n",
        "environment: {OPTIONS: --token abc}\n",
        "setup: [export WANDB_API_KEY=abc]\n",
        "setup: [module load cuda, 'export HF_TOKEN=\"hf_abc\"']\n",
        "setup: [HF_TOKEN=hf_abc huggingface-cli whoami]\n",
        "setup: [huggingface-cli login --token hf_abc]\n",
        "sbatch: {export: 'ALL,WANDB_API_KEY=abc'}\n",
        "srun: ['--export=ALL,WANDB_API_KEY=abc']\n",
    ],
)
def test_secrets_are_refused_without_being_repeated(tmp_path: Path, text: str) -> None:
    said = fault(tmp_path, text)
    assert "would be written into the job's script; export it where you call `sft-dist submit`" in said
    assert "abc" not in said


@pytest.mark.parametrize(
    "text",
    [
        "environment: {TOKENIZERS_PARALLELISM: false}\n",
        "environment: {HF_TOKEN_PATH: /home/me/token}\n",
        "setup: [export TOKENIZERS_PARALLELISM=false]\n",
        "setup: [export WANDB_API_KEY=$(cat ~/.wandb)]\n",
        "setup: ['export HF_TOKEN=\"$(cat ~/.hf)\"']\n",
        "setup: [module load keychain cuda]\n",
        "sbatch: {mail-type: END, exclusive-user: true}\n",
    ],
)
def test_what_only_looks_like_a_secret_is_taken(tmp_path: Path, text: str) -> None:
    read(tmp_path, text)


def test_words_of_the_environment_are_words(tmp_path: Path) -> None:
    profile = read(tmp_path, "environment: {A: 1, B: true, C: x y, D: 1.5}\n")
    assert profile.environment == {"A": "1", "B": "true", "C": "x y", "D": "1.5"}


def test_a_file_that_is_not_there_says_what_to_copy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--cluster: .*nothing\.yaml: no such file; copy one of .*\(a100, cpu, h100\)"):
        read_profile(tmp_path / "nothing.yaml")


def test_the_documented_keys_are_those_that_there_are() -> None:
    text = (ROOT / profile_docs.DOCUMENT_FILE).read_text(encoding="utf-8")
    assert profile_docs.document(text) == text, "run: python -m launch.slurm.profile_docs"
    for name in Profile.model_fields:
        assert f"| `{name}` |" in text
