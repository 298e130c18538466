"""Cards that are renewed: what was changed on the Hub is kept, everything else is written anew."""

import pytest
import yaml

from dit_hf.card_blocks import card_metadata, renew_card, sign_blocks


def card(figure, license="apache-2.0", **metadata):
    """A card with the block `quality`, and one without a figure."""
    front_matter = yaml.safe_dump({"license": license, **metadata})
    blocks = [f"<!-- dit_hf: begin {name} -->\n{text}\n<!-- dit_hf: end {name} -->\n" for name, text in figure.items()]
    return sign_blocks(f"---\n{front_matter}---\n\n# faces\n\n" + "\n".join(blocks))


OLD = card({"quality": "FID 20", "limits": "- faces"}, tags=["dit"])
NEW = card({"quality": "FID 10", "limits": "- faces"}, tags=["dit", "new"])


def test_an_unedited_card_becomes_the_new_one():
    assert renew_card(NEW, OLD, card_metadata(OLD)) == (NEW, [])


@pytest.mark.parametrize("newline", ["\n", "\r\n"])  # an editor of Windows
def test_words_and_licence_of_the_owner_stay_and_figures_are_renewed(newline):
    theirs = OLD.replace("apache-2.0", "mit").replace("# faces\n", "# faces\n\nMade for my aunt.\n") + "\nAsk me.\n"
    renewed, kept = renew_card(NEW, theirs.replace("\n", newline), card_metadata(OLD))
    assert card_metadata(renewed) == {"license": "mit", "tags": ["dit", "new"]}
    assert "# faces\n\nMade for my aunt.\n" in renewed
    assert renewed.endswith("\nAsk me.\n")
    assert "FID 10" in renewed
    assert "FID 20" not in renewed
    assert kept == ["license"]
    # And once more: what was kept is still known as theirs.
    assert renew_card(NEW, renewed, card_metadata(NEW)) == (renewed, ["license"])


def test_an_edited_section_is_kept_and_named():
    theirs = OLD.replace("FID 20", "FID 20, which is not much")
    renewed, kept = renew_card(NEW, theirs, card_metadata(OLD))
    assert "FID 20, which is not much" in renewed
    assert kept == ["the section quality"]


def test_a_deleted_section_stays_deleted():
    theirs = OLD[: OLD.index("<!-- dit_hf: begin limits")]
    renewed, kept = renew_card(NEW, theirs, card_metadata(OLD))
    assert "limits" not in renewed
    assert kept == []


def test_a_card_without_sections_keeps_its_text():
    theirs = "---\nlicense: mit # of my own\n---\nMy words.\n"
    renewed, kept = renew_card(NEW, theirs, None)
    assert renewed.endswith("\nMy words.\n")
    assert kept[0] == "license"
    assert "delete README.md there" in kept[1]
    # Where the repository holds nothing else, the site has written it: our text follows.
    renewed, kept = renew_card(NEW, theirs, None, is_only_file=True)
    assert renewed.index("My words.") < renewed.index("FID 10")
    assert card_metadata(renewed)["license"] == "mit"
    assert kept == ["license"]


def test_a_licence_keeps_its_name_and_link():
    new = card({"quality": "FID 10"}, "other", license_name="celeba", license_link="there")
    renewed, _ = renew_card(new, "---\nlicense: mit\n---\n", None, is_only_file=True)
    assert card_metadata(renewed) == {"license": "mit"}
    # One that nobody has changed follows the training data, and one that is named by an option counts more.
    assert card_metadata(renew_card(new, OLD, card_metadata(OLD))[0])["license_name"] == "celeba"
    keys = ("license", "license_name", "license_link")
    assert card_metadata(renew_card(new, "---\nlicense: mit\n---\n", None, keys)[0])["license"] == "other"


def test_metadata_that_describes_the_files_is_always_renewed():
    new = card({"quality": "FID 10"}, configs=[1])
    for theirs, base in ((card({}, configs=[2]), {}), (card({}, configs=[2]), None), (card({}), None)):
        renewed, kept = renew_card(new, theirs, base, ("configs",))
        assert card_metadata(renewed)["configs"] == [1]
        assert "configs" not in kept


@pytest.mark.parametrize("metadata", ["a: [", "- a"])
def test_metadata_that_cannot_be_read_is_left_alone(metadata):
    theirs = f"---\n{metadata}\n---\nMine.\n"
    assert renew_card(NEW, theirs, None) == (theirs, ["its metadata, which cannot be read"])


def test_metadata_that_does_not_change_keeps_its_comments():
    theirs = OLD.replace("license:", "# mine\nlicense:")
    assert "# mine\n" in renew_card(OLD, theirs, card_metadata(OLD))[0]
    assert card_metadata("---\n---\nText") == {}
