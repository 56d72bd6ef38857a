"""Tables: columns by their names, whatever their order, and what is no number named by its place."""

import gzip

import numpy as np
from numpy.testing import assert_array_equal

from train.config import Data
from train.data import load, load_test
from train.data.formats import tables

ROWS = "height,kind,width\n1.5,cat,2\n-3e2,dog,4\n.5,cat, 6 \n7,elk,8\n"


def write(path, text=ROWS, encoding="utf-8"):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def data(path, **options):
    return Data("csv", path=str(path), **{"label": "kind", "validation": 0} | options)


def test_columns_have_their_names_and_texts_are_classes_in_their_order(tmp_path):
    expected = np.float32([[1.5, 2], [-300, 4], [0.5, 6], [7, 8]])
    for text, encoding in [
        (ROWS, "utf-8"),
        (ROWS, "utf-8-sig"),
        (ROWS.replace(",", ";"), "utf-8"),
        (ROWS.replace(",", "\t"), "utf-8"),
        (ROWS.replace("\n", "\r\n"), "utf-8"),
        (ROWS.replace("cat", '"cat"').replace("width", '" width"').replace("1.5", '"1.5"'), "utf-8"),
        (ROWS.rstrip("\n"), "utf-8"),
        (ROWS.replace("\n7", "\n\n7"), "utf-8"),
        ("\n\r\n" + ROWS, "utf-8"),
        (ROWS.replace("cat", " cat "), "utf-8"),
        (ROWS.replace("2\n", "2, \n"), "utf-8"),
    ]:
        loaded = load(data(write(tmp_path / "table.csv", text, encoding), test=0.25))
        assert loaded.columns == ("height", "width") and loaded.labels.names == ("cat", "dog", "elk")
        assert_array_equal(loaded.train.inputs, expected, text, strict=True)
        assert_array_equal(loaded.train.labels, [0, 1, 0, 2], text)
        assert [len(loaded.train), len(loaded.test)] == [3, 1]


def test_names_of_columns_may_hold_separators_and_lines(tmp_path):
    for separator in ",;\t":
        text = separator.join(('"w,\tin\n\nkg"', '"h; a, ""b"""', "kind\n1", "2", "cat\n3", "4", "dog\n"))
        loaded = load(data(write(tmp_path / "table.csv", text), test=0.5))
        assert loaded.columns == ("w,\tin\n\nkg", 'h; a, "b"')
        assert_array_equal(loaded.train.inputs, [[1, 2], [3, 4]])
        text = separator.join(('diagonal in "', "kind\n1", '"cat"\n2', "dog\n"))
        loaded = load(data(write(tmp_path / "inches.csv", text), test=0.5))
        assert loaded.columns == ('diagonal in "',) and loaded.labels.names == ("cat", "dog")


def test_sign_of_comments_in_other_files_is_a_part_of_a_label(tmp_path):
    text = "a,#kind\n" + "1,#1\n2,c#\n" * 10
    loaded = load(data(write(tmp_path / "table.csv", text), label="#kind"))
    assert loaded.labels.names == ("#1", "c#") and len(loaded.train) == 18


def test_folder_has_a_table_for_each_split_whose_columns_may_stand_in_another_order(tmp_path):
    folder = tmp_path / "tables"
    write(folder / "train.csv")
    write(folder / "test.csv", "width,height,more,kind\n2,1,9,dog\n")
    write(folder / "validation.csv", "kind,width,height\ncat,4,3\nelk,6,5\n")
    loaded = load(data(folder))
    assert [len(split) for split in (loaded.train, loaded.validation, loaded.test)] == [4, 2, 1]
    assert_array_equal(loaded.test.inputs, np.float32([[1, 2]]))
    assert_array_equal(loaded.validation.inputs, np.float32([[3, 4], [5, 6]]))
    assert loaded.validation.labels.tolist() == [0, 2] and loaded.test.labels.tolist() == [1]
    assert loaded.notes == ()
    (folder / "validation.csv").rename(folder / "val.csv")
    assert load(data(folder)).notes[0].startswith(f"Left out of '{folder}': 'val.csv'; expected a .csv file")


def test_numbers_are_targets_of_squared_error_and_names_of_classes_otherwise(tmp_path, refusal):
    path = write(tmp_path / "table.csv", "a,y\n" + "".join(f"{i},{10 * (i % 3) - 10}\n" for i in range(12)))
    classes = load(data(path, label="y"))
    assert classes.labels.names == ("-10", "0", "10") and classes.train.labels[:4].tolist() == [0, 1, 2, 0]
    targets = load(data(path, label="y"), loss="squared_error")
    assert targets.train.labels[:4].tolist() == [-10, 0, 10, -10] and targets.labels.counts == ()
    assert targets.train.labels.dtype == np.float32
    of_training = targets.train.labels[targets.train.rows].astype(float)
    assert targets.labels[2:] == (of_training.mean(), of_training.std())
    write(path, "a,y\n1,2.5\n2,3\n3,4\n")
    assert "expected classes as labels, got the number 2.5; for numbers set model.loss" in refusal(
        load, data(path, label="y")
    )
    write(path, "a,y\n1,2.5\n2,cat\n3,4\n")
    sentence = refusal(load, data(path, label="y"), loss="squared_error")
    assert "got 'cat'; for classes set model.loss = 'cross_entropy'." in sentence


REFUSED = [
    ("a,kind\n1,x\n\n2;y\n", "row 2 has"),
    ("a,kind\n1,x\nRome,y\n", "row 2 has 'Rome' in column 'a', which has to be a finite number"),
    ("a,kind\n1,x\n,y\n", "row 2 has nothing in column 'a'"),
    ("a,kind\n1,x\nnan,y\n", "row 2 has 'nan' in column 'a'"),
    ("a,kind\n1,x\n1e999,y\n", "row 2 has '1e999' in column 'a'"),
    ("a,kind\n1,x\n1_0,y\n", "row 2 has '1_0' in column 'a'"),
    ("a,kind\n1,x\n\uff11,y\n", "row 2 has '\uff11' in column 'a'"),  # a wide 1
    ("a,b,kind\n1,2,x\n1,y\n", "in column 'b'"),
    ("a,kind\nfirst,1,x\nsecond,2,y\n", "row 1 has 'x' after the last of its 2 columns"),
    ("a,b,kind\n1,2,x\n1,5,2,y\n", "row 2 has 'y' after the last of its 3 columns; put quotes around cells"),
    ("a,kind\n1,x\n2,\n", "row 2 has no label in column 'kind'"),
    ("a,kinds\n1,x\n", "data.label = 'kind' is no column of it; perhaps you meant 'kinds'"),
    ("a,b\n1,x\n", "data.label = 'kind' is no column of it, which has a, b"),
    ("1,2\n3,4\n", "its first line has no names of columns"),
    (",a,kind\n0,1,x\n", "column 1 has no name; give it one, or leave it out (pandas: index=False)"),
    ("a,a,kind\n0,1,x\n", "two columns are called 'a'"),
    ("kind\nx\n", "it has no column but that of the labels"),
    ("", "it is empty"),
    ("a,kind\n", ""),
    ("a,kind\n1,\udcff\n", "can't decode byte 0xff"),
]


def test_what_is_no_such_table_is_named_by_its_place(tmp_path, refusal):
    for text, reason in REFUSED:
        path = tmp_path / "table.csv"
        path.write_bytes(text.encode(errors="surrogateescape"))
        sentence = refusal(load, data(path))
        assert sentence.startswith(str(path)) and reason in sentence, (text, sentence)
    path.write_bytes(gzip.compress(ROWS.encode()))
    assert f"{path} cannot be read: " in refusal(load, data(path))
    write(tmp_path / "folder" / "test.csv")
    assert "which has none of it." in refusal(load, data(tmp_path / "folder"))
    write(tmp_path / "folder" / "train.csv", "height,kind\n1,x\n")
    write(tmp_path / "folder" / "test.csv", "length,kind\n1,x\n")
    sentence = refusal(load, data(tmp_path / "folder"))
    assert (
        f"{tmp_path}/folder/test.csv cannot be read: it has no column 'height', which has length" in sentence
    )


def test_features_alone_are_read_for_prediction(tmp_path, refusal):
    path = write(tmp_path / "new.csv", "width,name,height\n2,Rome,1\n4,Oslo,3\n")
    assert_array_equal(tables.features(path, ("height", "width")), [[1, 2], [3, 4]])
    sentence = refusal(tables.features, path, ("height", "widht"))
    assert "it has no column 'widht'; perhaps you meant 'width'" in sentence


def test_other_tables_are_evaluated_by_the_names_of_the_first(tmp_path, refusal):
    trained = load(data(write(tmp_path / "first.csv"), test=0.25))
    others = data(write(tmp_path / "others.csv", "kind,width,height\nelk,2,1\ncat,4,3\n"))
    options = {"loss": "cross_entropy", "labels": trained.labels, "columns": trained.columns}
    name, split, _ = load_test(others, **options, trained_on=trained.fingerprint)
    assert_array_equal(split.inputs, np.float32([[1, 2], [3, 4]]))
    assert (name, split.labels.tolist(), len(split)) == ("all", [2, 0], 2)
    name, held_out, _ = load_test(
        data(tmp_path / "first.csv", test=0.25), **options, trained_on=trained.fingerprint
    )
    assert name == "test"
    assert_array_equal(held_out.rows, trained.test.rows)
    write(tmp_path / "others.csv", "kind,width,height\nfox,2,1\n")
    assert "that the network was trained on, 'cat', 'dog', 'elk', got 'fox'." in refusal(
        load_test, others, **options
    )
    write(tmp_path / "others.csv", "kind,width,depth\ncat,2,1\n")
    assert "expected the columns height, width, got width, depth." in refusal(load_test, others, **options)
