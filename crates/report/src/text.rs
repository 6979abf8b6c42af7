//! Outside text made harmless, and numbers in one way everywhere.
//!
//! Names and notes come from files and models. In both writers a control character, an invisible one or one that turns the
//! direction of writing becomes a visible stand-in, so that no text can look like what it is not.

use std::fmt::Write as _;

/// What is shown for a value that was not measured.
pub(crate) const MISSING: &str = "–";

/// Shows what cannot be seen.
pub(crate) fn visible(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            // Control pictures stand at U+2400 in the order of the characters.
            '\0'..='\x1f' => out.push(char::from_u32(0x2400 + c as u32).unwrap_or('\u{fffd}')),
            '\x7f' => out.push('␡'),
            _ if hidden(c) => {
                let _ = write!(out, "⟨U+{:04X}⟩", c as u32);
            }
            _ => out.push(c),
        }
    }
    out
}

/// Characters without a picture of their own that change how others look.
fn hidden(c: char) -> bool {
    matches!(c,
        '\u{80}'..='\u{9f}' | '\u{ad}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{180e}' | '\u{200b}'..='\u{200f}'
        | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}'
        | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}' | '\u{e0000}'..='\u{e0fff}')
}

/// Text for an HTML element or a quoted attribute.
pub(crate) fn html(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in visible(text).chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            _ => out.push(c),
        }
    }
    out
}

/// Text for a line, a list item or a table cell of Markdown: no markup, no link, no cell border.
pub(crate) fn markdown(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let shown = visible(text);
    let chars: Vec<char> = shown.trim().chars().collect();
    // Digits before this point could open a numbered list.
    let number = chars.iter().take_while(|c| c.is_ascii_digit()).count();
    for (i, &c) in chars.iter().enumerate() {
        let starts_list = match c {
            '-' | '+' | '=' => i == 0 && !chars.get(1).is_some_and(char::is_ascii_digit),
            '.' => i > 0 && i == number && !chars.get(i + 1).is_some_and(char::is_ascii_digit),
            _ => false,
        };
        // Readers make links out of bare addresses.
        let links = match c {
            ':' => chars[i + 1..].starts_with(&['/', '/']),
            '.' => i >= 3 && chars[i - 3..i].iter().all(|c| c.eq_ignore_ascii_case(&'w')),
            _ => false,
        };
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\\' | '`' | '*' | '_' | '{' | '}' | '[' | ']' | '(' | ')' | '#' | '!' | '|' | '~' | '$'
            | '@' => {
                out.push('\\');
                out.push(c);
            }
            _ => {
                if starts_list || links {
                    out.push('\\');
                }
                out.push(c);
            }
        }
    }
    out
}

/// Name in an error: between back-ticks, on one line.
pub(crate) fn quoted(text: &str) -> String {
    format!("`{}`", visible(text))
}

/// What a number is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// A share, shown in percent.
    Percent,
    /// A difference of shares, shown in points with its sign.
    Points,
    /// Nat per token.
    Kl,
    /// A difference of them.
    KlChange,
    /// Seconds.
    Seconds,
    /// A difference of them.
    SecondsChange,
}

impl Unit {
    /// The number in this unit.
    pub(crate) fn show(self, value: f64) -> String {
        match self {
            Self::Percent => number(100.0 * value, 1, false),
            Self::Points => number(100.0 * value, 1, true),
            Self::Kl => number(value, 4, false),
            Self::KlChange => number(value, 4, true),
            Self::Seconds => number(value, 1, false),
            Self::SecondsChange => number(value, 1, true),
        }
    }
}

/// `value` with `digits` after the point, a real minus sign, and no sign at all on what is shown as 0.
pub(crate) fn number(value: f64, digits: usize, plus: bool) -> String {
    let size = format!("{:.digits$}", value.abs());
    let sign = if size.bytes().all(|b| matches!(b, b'0' | b'.')) {
        ""
    } else if value < 0.0 {
        "−"
    } else if plus {
        "+"
    } else {
        ""
    };
    format!("{sign}{size}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn html_of_hostile_text() {
        assert_eq!(
            html("<script>alert('a' & \"b\")</script>"),
            "&lt;script&gt;alert(&#39;a&#39; &amp; &quot;b&quot;)&lt;/script&gt;"
        );
        assert_eq!(html("a\nb\u{202e}c\0\u{7f}\u{9b}"), "a␊b⟨U+202E⟩c␀␡⟨U+009B⟩");
        assert_eq!(html("größer, 模型"), "größer, 模型");
    }

    #[test]
    fn markdown_of_hostile_text() {
        assert_eq!(markdown("a | b"), "a \\| b");
        assert_eq!(markdown("x](javascript:alert(1))"), "x\\]\\(javascript:alert\\(1\\)\\)");
        assert_eq!(markdown("<script>"), "&lt;script&gt;");
        assert_eq!(markdown("\\|"), "\\\\\\|");
        assert_eq!(markdown("`code`\r\n# head"), "\\`code\\`␍␊\\# head");
        assert_eq!(markdown("see https://x.y or www.x.y"), "see https\\://x.y or www\\.x.y");
        assert_eq!(markdown("- item"), "\\- item");
        assert_eq!(markdown("12. item"), "12\\. item");
        assert_eq!(markdown("few-shot 1.5"), "few-shot 1.5");
        assert_eq!(markdown("+1.5 better"), "+1.5 better");
        assert_eq!(markdown("1.5"), "1.5");
        assert_eq!(markdown("\u{202e}gpj"), "⟨U+202E⟩gpj");
    }

    #[test]
    fn numbers_carry_their_sign_and_zero_has_none() {
        assert_eq!(Unit::Points.show(-0.041), "−4.1");
        assert_eq!(Unit::Points.show(0.003), "+0.3");
        assert_eq!(Unit::Points.show(-0.0001), "0.0");
        assert_eq!(Unit::Percent.show(0.0), "0.0");
        assert_eq!(Unit::Percent.show(1.0), "100.0");
        assert_eq!(Unit::Kl.show(0.00312), "0.0031");
    }
}
