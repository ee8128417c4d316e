"""A reader's votes on paper: a line that is no vote costs that vote, not the others."""

from conftest import script

blind_check = script("scripts/blind_check.py")


def test_an_odd_line_counts_as_no_vote(capsys):
    drawn = blind_check.drawn(7)
    votes = ["A" if first else "B" for _, first in drawn]
    votes[3:6] = ["Both are fine.", "B because it is shorter", ""]
    found = blind_check.score(7, votes)
    assert (found["agreement"]["rate"], found["agreement"]["n"]) == (1.0, blind_check.PAIRS - 3)
    assert capsys.readouterr().out == "3 lines are no vote\n"
