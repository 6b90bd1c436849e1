"""A terminal to read the screen of."""

import re
import unicodedata


class Terminal:
    """Just enough of a terminal to read the screen; anything that it does not know fails the test."""

    SEQUENCE = re.compile(r"\x1b\[(\??)(\d*)([A-Za-z])")
    CUT_SEQUENCE = re.compile(r"\x1b(\[\??\d*)?(?=\x1b)")

    def __init__(self, columns):
        self.columns, self.lines, self.row, self.column = columns, [[]], 0, 0
        self.cursor_shown = self.wraps = True
        self.styles = set()

    def feed(self, text):
        position = 0
        while position < len(text):
            # A new escape character ends an unfinished sequence.
            if cut := self.CUT_SEQUENCE.match(text, position):
                position = cut.end()
                continue
            if match := self.SEQUENCE.match(text, position):
                self.control(*match.groups())
                position = match.end()
                continue
            char = text[position]
            if char == "\n":
                self.row += 1
                self.lines += [[] for _ in range(self.row + 1 - len(self.lines))]
            elif char == "\r":
                self.column = 0
            elif char == "\t":
                self.column = min((self.column // 8 + 1) * 8, self.columns - 1)
            else:
                assert unicodedata.category(char) not in ("Cc", "Cf"), f"{char!r} reached the terminal"
                self.put(char)
            position += 1
        return self

    def put(self, char):
        width = 0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        if self.column + width > self.columns:
            assert self.wraps, "a frame's line is wider than the terminal"
            self.feed("\r\n")
        line = self.lines[self.row]
        line += [" "] * (self.column - len(line))
        if width:
            line[self.column : self.column + width] = [char] + [""] * (width - 1)
        else:
            line[self.column - 1] += char
        self.column += width

    def control(self, private, number, kind):
        if private:
            assert number in ("25", "7") and kind in "hl"
            self.cursor_shown = kind == "h" if number == "25" else self.cursor_shown
            self.wraps = kind == "h" if number == "7" else self.wraps
        elif kind == "A":
            self.row -= int(number)
            assert self.row >= 0, "the cursor left the screen"
        elif kind in "KJ" and number in ("", "0"):
            del self.lines[self.row][self.column :]
            if kind == "J":
                del self.lines[self.row + 1 :]
        else:
            assert kind == "m"
            self.styles.add(number)

    def text(self):
        return "\n".join("".join(line) for line in self.lines)
