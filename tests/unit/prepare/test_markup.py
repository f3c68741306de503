"""Markup to text: what a reader sees of a page, in paragraphs, and nothing of what surrounds it."""

from raptr_ds.prepare.markup import html_to_text, man_to_text

PAGE = """<!DOCTYPE html><html><head><title>T</title><style>p {color: red}</style></head><body>
<div class="related"><ul><li>next</li></ul></div>
<div class="document"><div class="body" role="main">
<h1>Sums<a class="headerlink" href="#s">¶</a></h1>
<p>One &amp; one
   are <b>two</b>.<p>An open paragraph.
<pre>def f():
    return  2
</pre>
<div><table><tr><td>a</td><td>b</td></tr></table></div>
<script>if (1 < 2) { alert("no") }</script>
<div id="toc"><div>contents</div></div>
After the boxes.</div></div>
<div class="sphinxsidebar">sidebar</div></body></html>"""


def test_a_page_gives_its_main_part_in_paragraphs() -> None:
    assert html_to_text(PAGE).split("\n\n") == [
        "Sums",
        "One & one are two.",
        "An open paragraph.",
        "def f():\n    return  2",
        "a b",
        "After the boxes.",
    ]


def test_a_page_without_a_main_part_gives_its_body() -> None:
    page = "<html><head><title>no</title></head><body><div class=navheader>up</div>One.<br>Two.</body></html>"
    assert html_to_text(page) == "One.\nTwo."


def test_spaces_count_in_preformatted_text_only() -> None:
    page = "<p>One <b> two</b>\u00a0\n three</p><pre>\n<b>  if</b> it:\n\n    <i></i>  do</pre>"
    assert html_to_text(page) == "One two three\n\n  if it:\n\n      do"


def test_comments_and_unclosed_elements_are_no_text() -> None:
    page = "<!DOCTYPE html><!-- no --><ul><li>One<!-- no --> and<li>two<hr>three<p>four<p>five</ul>" + "<p>x" * 3000
    assert html_to_text(page).split("\n\n") == ["One and", "two", "three", "four", "five", *["x"] * 3000]


def test_a_manual_page_gives_its_prose() -> None:
    page = r""".\" a comment
.de Vb
.ft CW
..
.TH SUM 1
text before the first heading
.SH "NAME"
sum \- add \fInumbers\fR\|, \*(L"quickly\*(R"
.PP
Filled
lines \&.
.Vb 1
\&    sum 1
\&    2
.Ve
.IP "\-v" 4
.BR verbose (3)
"""
    assert man_to_text(page).split("\n\n") == [
        "NAME",
        'sum - add numbers, "quickly"',
        "Filled lines .",
        "    sum 1\n    2",
        "-v verbose(3)",
    ]
