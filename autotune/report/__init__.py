"""The report: a record of figures, and its pages in HTML, JSON and Markdown.

`record` holds the values and what may be claimed of them, `json_text` their file form, `tables` and
`plots` their appearance, `pages` the writers.
"""
