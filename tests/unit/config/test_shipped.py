import pytest

from switchtitan.config.shipped import FOLDER, QUICKSTART, find_config


def test_the_quickstart_ships():
    assert QUICKSTART.is_file()


@pytest.mark.parametrize("given", [QUICKSTART.name, f"train_configs/{QUICKSTART.name}"])
def test_a_shipped_configuration_is_found_from_any_folder_and_its_path_is_printed(
    given, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    assert find_config(given) == FOLDER / QUICKSTART.name
    assert (
        capsys.readouterr().err
        == f"{given}: using {QUICKSTART}, which is installed with switchtitan\n"
    )


def test_an_existing_file_is_preferred_and_nothing_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / QUICKSTART.name).touch()
    for given in (QUICKSTART.name, "nowhere.toml", str(tmp_path / "nowhere.toml")):
        assert str(find_config(given)) == given
    assert capsys.readouterr().err == ""
