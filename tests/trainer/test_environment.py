"""What every result file says of where it was measured."""

from trainer.environment import provenance, version_of


def test_provenance_names_commit_versions_and_processor():
    taken = provenance()
    assert all(isinstance(value, str) and value for value in taken.values())
    assert taken["torch"] != "absent"
    assert taken["python"].count(".") == 2
    assert version_of("no-such-distribution") == "absent"
