//! TOML with comments, as text: what an owner reads and edits.

/// Marks a line that needs the owner.
pub(super) const EDIT: &str = "EDIT";

/// A configuration under construction.
#[derive(Debug, Default)]
pub(super) struct Text {
    written: String,
    /// Lines that are marked [`EDIT`].
    pub(super) edits: usize,
    /// Settings that were not carried over.
    pub(super) lost: usize,
}

impl Text {
    pub(super) fn line(&mut self, line: impl AsRef<str>) {
        self.written.push_str(line.as_ref());
        self.written.push('\n');
    }

    pub(super) fn comment(&mut self, comment: impl AsRef<str>) {
        for line in comment.as_ref().lines() {
            self.line(format!("# {line}"));
        }
    }

    pub(super) fn table(&mut self, name: &str) {
        if !self.written.is_empty() && !self.written.ends_with("\n\n") {
            self.written.push('\n');
        }
        self.line(format!("[{name}]"));
    }

    /// A blank line, and a comment that stands above a table.
    pub(super) fn remark(&mut self, comment: impl AsRef<str>) {
        if !self.written.is_empty() && !self.written.ends_with("\n\n") {
            self.written.push('\n');
        }
        self.comment(comment);
    }

    /// A line that the owner must complete, as a comment so that `check` asks for it.
    pub(super) fn edit(&mut self, line: &str, why: &str) {
        self.edits += 1;
        self.line(format!("# {line}   # {EDIT}: {why}"));
    }

    pub(super) fn lost(&mut self, what: &str, why: &str) {
        self.lost += 1;
        self.comment(format!("Not carried over: {what}: {why}."));
    }

    pub(super) fn finish(self) -> String {
        self.written
    }
}

/// A string in quotes.
pub(super) fn quoted(text: &str) -> String {
    // JSON's escapes are all TOML's, and DEL is the one character that TOML escapes and JSON does not.
    serde_json::Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}

/// Text of others within a comment: one line without control characters.
pub(super) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// The name of a table that needs no quotes: letters, digits, `-` and `_`.
pub(super) fn bare(text: &str) -> String {
    let name: String =
        text.chars().map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '-' }).collect();
    let name = name.trim_matches('-');
    if name.is_empty() { "unnamed".to_owned() } else { name.to_owned() }
}

/// The first of `name`, `name-2`, `name-3` .. that `is_taken` does not know.
pub(super) fn unique(name: &str, is_taken: impl Fn(&str) -> bool) -> String {
    let mut candidate = name.to_owned();
    let mut number = 1_u32;
    while is_taken(&candidate) {
        number += 1;
        candidate = format!("{name}-{number}");
    }
    candidate
}
