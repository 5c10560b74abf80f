import json

from fetal_flax._util.files import (
    csv_bytes,
    growing_csv,
    growing_json,
    remove_temporaries,
    replacing,
    whole_objects,
    whole_rows,
)

COLUMNS = ["name", "size"]
ROWS = [["a", "1"], ['ä, "b"\nc', "2"], ["", ""], ["d", "3"]]
OBJECTS = [b"{}", '{"ä": "]\\n{"}'.encode(), b'{"b": [1]}']


def test_of_a_csv_that_ends_anywhere_the_whole_rows_are_read(tmp_path):
    path = tmp_path / "a.csv"
    with growing_csv(path, COLUMNS) as file:
        for row in ROWS:
            file.add(csv_bytes([row]))
    content = path.read_bytes()
    ends = [len(csv_bytes([COLUMNS, *ROWS[:count]])) for count in range(len(ROWS) + 1)]
    for end in range(len(content) + 1):
        path.write_bytes(content[:end])
        whole = sum(row_end <= end for row_end in ends[1:])
        assert whole_rows(path, COLUMNS) == ROWS[:whole]
    for after in (b"\0" * 5000, b"x" * 200_000, b"\xff\xfe,1\n", b"1,2,3\n", b"\n"):
        path.write_bytes(content + after)
        assert whole_rows(path, COLUMNS) == ROWS
    assert whole_rows(path, [*COLUMNS, "more"]) == whole_rows(tmp_path / "none", COLUMNS) == []


def test_of_a_json_list_that_ends_anywhere_the_whole_objects_are_read(tmp_path):
    path = tmp_path / "a.json"
    with growing_json(path) as file:
        for text in OBJECTS:
            file.add(text)
    content = path.read_bytes()
    for end in range(len(content) + 1):
        path.write_bytes(content[:end])
        whole = whole_objects(path)
        assert whole == OBJECTS[: len(whole)]
        assert len(whole) >= content[:end].count(b",\n")
    assert whole_objects(path) == OBJECTS and whole_objects(tmp_path / "none") == []
    path.write_bytes(content + b"\0" * 5000)
    assert whole_objects(path) == OBJECTS


def test_a_file_grows_behind_what_is_kept(tmp_path):
    paths = tmp_path / "a.csv", tmp_path / "a.json"
    for count in range(len(OBJECTS) + 1):
        for path in paths:
            path.write_bytes(b"x" * 1000)
        table = growing_csv(paths[0], COLUMNS, ROWS[:count])
        objects = growing_json(paths[1], OBJECTS[:count])
        assert whole_rows(paths[0], COLUMNS) == ROWS[:count]
        assert whole_objects(paths[1]) == OBJECTS[:count]
        with table, objects:
            for row in ROWS[count:]:
                table.add(csv_bytes([row]))
            for text in OBJECTS[count:]:
                objects.add(text)
        assert paths[0].read_bytes() == csv_bytes([COLUMNS, *ROWS])
        assert json.loads(paths[1].read_bytes()) == [json.loads(text) for text in OBJECTS]


def test_what_a_killed_process_was_writing_is_removed_and_nothing_else(tmp_path):
    with replacing(tmp_path / "a.png") as temporary:
        temporary.touch()
    for name in (temporary.name, "a.tmp", ".a.1.tmp", temporary.name + "x"):
        (tmp_path / name).touch()
    remove_temporaries(tmp_path)
    remove_temporaries(tmp_path / "none")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"a.png", "a.tmp", ".a.1.tmp", temporary.name + "x"}


def test_only_the_named_files_are_cleared_where_others_write_too(tmp_path):
    with replacing(tmp_path / "a.png") as ours, replacing(tmp_path / "b.png") as others:
        ours.touch()
        others.touch()
        remove_temporaries(tmp_path, "a.png", "none.png")
        assert [path.name for path in tmp_path.iterdir()] == [others.name]
        ours.touch()
