"""Reads a page of matches."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """Rows of figures, each with its class, path, image and words; filters by value, with their words."""

    def __init__(self, path):
        super().__init__()
        self.path, self.rows, self.filters, self.texts, self.addresses = path, [], {}, [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.addresses += [attrs[name] for name in ("src", "href") if name in attrs]
        if tag == "section":
            self.rows.append({"kinds": attrs["class"].split(), "figures": []})
        elif tag == "figure":
            self.texts = []
            self.rows[-1]["figures"].append({"frame": attrs["class"], "path": attrs["title"], "words": self.texts})
        elif tag == "img":
            self.rows[-1]["figures"][-1]["image"] = attrs
        elif tag == "input" and attrs["type"] == "radio":
            self.filters[attrs["value"]] = self.texts = []

    def handle_endtag(self, tag):
        if tag in ("figure", "label"):
            self.texts = []

    def handle_data(self, data):
        self.texts += data.split()

    def figures(self, row):
        return self.rows[row]["figures"]
