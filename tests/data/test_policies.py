"""Policies: the shipped ones, user-written ones, and what is wrong with the rest."""

from dataclasses import replace
from pathlib import Path

import pytest

from jaxguard.data.examples import Example
from jaxguard.data.policies import DEFAULT_INSTRUCTION, QUESTIONS, Category, Policy, load_policy, policy_for
from jaxguard.utils.errors import JaxguardError

SHIPPED = Path(__file__).parents[2] / "configs" / "policies"


@pytest.fixture
def write(tmp_path):
    def write(text, name="mine"):
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
        return tmp_path

    return write


def message(folder):
    with pytest.raises(JaxguardError) as error:
        load_policy("mine", folder)
    return str(error.value)


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_policies_load_under_their_files_names(path):
    assert load_policy(path.stem, SHIPPED).name == path.stem


def test_wildguard_has_13_categories_and_asks_three_questions():
    policy = load_policy("wildguard", SHIPPED)
    assert len(policy.categories) == 13
    assert policy.asks == QUESTIONS


def test_aegis_has_22_categories_in_its_own_numbering():
    policy = load_policy("aegis2", SHIPPED)
    assert len(policy.categories) == 22
    assert policy.asks == ("prompt_harm", "response_harm")
    numbered = {1: "Violence", 7: "Sexual (minor)", 16: "Malware", 22: "Immoral/Unethical"}
    assert {i: policy.categories[i - 1].name for i in numbered} == numbered


@pytest.mark.parametrize("name", ["wildguard", "aegis2"])
def test_each_category_is_described_in_one_sentence(name):
    for category in load_policy(name, SHIPPED).categories:
        assert category.description.endswith(".")
        assert category.description.count(". ") == 0
        assert len(category.description.split()) >= 6


def test_rules_alone_are_a_policy(write):
    policy = load_policy("mine", write("name: mine\nrules: |\n  Be kind.\n  Be brief.\n"))
    assert policy == Policy("mine", rules="Be kind.\nBe brief.")
    assert policy.instruction == DEFAULT_INSTRUCTION


def test_categories_need_no_description_and_lose_their_line_breaks(write):
    text = 'name: mine\ncategories:\n  - name: A\n  - {name: "B\\nS3: C", description: "two\\n  lines"}\n'
    assert load_policy("mine", write(text)).categories == (Category("A"), Category("B S3: C", "two lines"))


def test_asks_are_brought_into_one_order(write):
    folder = write("name: mine\nrules: x\nasks: [response_refusal, prompt_harm]\n")
    assert load_policy("mine", folder).asks == ("prompt_harm", "response_refusal")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rules: x\n", ["field 'name' is missing"]),
        ("name: mine\nrule: x\n", ["unknown field 'rule'", "did you mean 'rules'?"]),
        ("name: mine\nrules: x\nasks: [prompt_ham]\n", ["asks.0", "'prompt_ham'", "did you mean 'prompt_harm'?"]),
        ("name: mine\nrules: x\nasks: []\n", ["asks", "at least one"]),
        ("name: mine\nrules: x\nasks: [prompt_harm, prompt_harm]\n", ["'prompt_harm' is given twice"]),
        ("name: mine\n", ["categories, or rules, or both"]),
        ("name: mine\nrules: '  '\n", ["categories, or rules, or both"]),
        ("name: mine\ncategories: [{description: x}]\n", ["'categories.0.name' is missing"]),
        ("name: mine\ncategories: [{name: x, describtion: y}]\n", ["categories.0", "did you mean 'description'?"]),
        ("name: mine\ncategories: [{name: x}, {name: X}]\n", ["'x' is given twice"]),
        ("name: mine\ncategories: Violence\n", ["categories", "expected a list"]),
        ("name: ' '\nrules: x\n", ["name"]),
        ("[", ["not YAML"]),
    ],
)
def test_mistakes_are_named(write, text, words):
    error = message(write(text))
    assert "mine.yaml" in error
    assert all(word in error for word in words), error


def test_an_unknown_policy_is_named_with_the_nearest():
    with pytest.raises(JaxguardError, match=r"'wildgard'.*'wildguard'"):
        load_policy("wildgard", SHIPPED)


def test_load_by_path(write):
    folder = write("name: mine\nrules: x\n")
    assert load_policy(str(folder / "mine.yaml"), SHIPPED).rules == "x"


def test_the_digest_changes_with_what_the_guard_reads(write):
    folder = write("name: mine\nrules: x\n")
    first = load_policy("mine", folder).digest
    write("name: mine\ndescription: for people\nrules: x\n")
    assert load_policy("mine", folder).digest == first
    write("name: mine\nrules: y\n")
    assert load_policy("mine", folder).digest != first


def example(policy):
    return Example("1", "test", "hello", prompt_label="unharmful", policy=policy)


def test_an_example_without_a_policy_has_the_runs():
    default = load_policy("wildguard", SHIPPED)
    assert policy_for(example(None), default, SHIPPED) is default
    assert policy_for(example("wildguard"), default, SHIPPED) is default


def test_an_example_may_name_a_policy():
    assert policy_for(example("aegis2"), load_policy("wildguard", SHIPPED), SHIPPED).name == "aegis2"


@pytest.mark.parametrize("rules", ["Only talk of trains.", "trains", "x" * 5000])
def test_anything_else_is_the_rules_themselves(rules):
    default = Policy("mine", rules="x", asks=("prompt_harm",), instruction="Judge by the taxonomy.")
    own = policy_for(example(rules), default, SHIPPED)
    assert (own.rules, own.categories, own.asks) == (rules, (), ("prompt_harm",))
    assert own.instruction == DEFAULT_INSTRUCTION


@pytest.mark.parametrize("name", ["novel/book_spoiler", "topic_folowing"])
def test_a_name_of_no_policy_is_not_taken_for_rules(name):
    with pytest.raises(JaxguardError, match=rf"'1'.*'{name}'.*'{name[:5]}"):
        policy_for(example(name), Policy("mine", rules="x"), SHIPPED)


def test_an_example_cannot_name_a_file_elsewhere(write):
    outside = write("name: outside\nrules: from outside\n", "outside")
    (outside / "policies").mkdir()
    for name in ("../outside", str(outside / "outside"), "../outside.yaml"):
        assert policy_for(example(name), Policy("mine", rules="x"), outside / "policies").rules == name


def test_an_example_may_name_a_policy_in_a_folder():
    default = load_policy("wildguard", SHIPPED)
    chosen = policy_for(example("novel/book_spoilers"), default, SHIPPED)
    assert (chosen.name, len(chosen.categories)) == ("novel/book_spoilers", 1)
    own = load_policy("novel/book_spoilers", SHIPPED)
    assert policy_for(example("novel/book_spoilers"), own, SHIPPED) is own


@pytest.mark.parametrize("name", ["novel/../aegis2", "../policies/aegis2", "novel/x/../../aegis2", "/aegis2", "novel/"])
def test_a_folder_is_no_way_out(name):
    assert policy_for(example(name), Policy("mine", rules="x"), SHIPPED).rules == name


def test_an_allow_list_is_read_and_shown_after_the_rules(write):
    text = 'name: mine\ncategories: [{name: A}]\nrules: Be kind.\nallowed:\n  - bread\n  - "rye\\nS9: rolls"\n'
    policy = load_policy("mine", write(text))
    assert policy.allowed == ("bread", "rye S9: rolls")
    assert policy.taxonomy == "S1: A.\nBe kind.\nAllowed:\n- bread\n- rye S9: rolls"
    assert load_policy("mine", write("name: mine\nrules: x\nallowed: [y]\n")).taxonomy == "x\nAllowed:\n- y"


def test_a_policy_without_an_allow_list_is_as_it_was():
    plain = Policy("mine", (Category("A", "b."),), "Be kind.")
    assert plain.taxonomy == "S1: A. b.\nBe kind."
    # Manifests and stores of traces hold these hashes.
    assert plain.digest == "b417926921fe63e5e507566de3d943f82b85d6996813b06adbaa764b81a10d24"
    assert replace(plain, allowed=("bread",)).digest != plain.digest


@pytest.mark.parametrize("allowed", ["bread", "[' ']", "[1]"])
def test_an_allow_list_is_a_list_of_texts(write, allowed):
    assert "allowed" in message(write(f"name: mine\nrules: x\nallowed: {allowed}\n"))
