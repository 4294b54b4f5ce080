"""The page of foreign clients keeps the rows that are not measured again."""

from bench import foreign


def test_rows_that_are_not_measured_again_stay_with_their_commit(monkeypatch, tmp_path):
    every = [(network, client.name) for network in foreign.NETWORKS for client in foreign.clients_of(network)]
    page = tmp_path / "page.md"
    monkeypatch.setattr(foreign, "PAGE", page)
    monkeypatch.setattr(foreign, "program", lambda: {"commit": "first"})
    monkeypatch.setattr(foreign, "measured", lambda network, client: {"network": network, "client": client.name})
    foreign.main([])
    assert page.read_text().count("| first |") == len(every) >= 60
    monkeypatch.setattr(foreign, "program", lambda: {"commit": "second"})
    foreign.main(["mixup"])
    rows = foreign.kept_rows(page.read_text())
    assert {client for (_, client), row in rows.items() if row["commit"] == "second"} == {"mixup"}
    assert list(rows) == every
