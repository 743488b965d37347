//! A price file as text.

use std::fmt::{self, Display, Write};

use super::{Line, PriceFile, PriceTable, UNIT};
use crate::economics::{Tier, TokenPrice};

/// A price as the shortest decimal of USD per million tokens.
pub fn decimal(price: TokenPrice) -> String {
    let pico = price.as_pico_per_token();
    let fraction = format!("{:06}", pico % 1_000_000);
    let fraction = fraction.trim_end_matches('0');
    format!("{}.{}", pico / 1_000_000, if fraction.is_empty() { "0" } else { fraction })
}

/// TOML that [`super::read`] reads back as the same file.
impl Display for PriceFile {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            out,
            "# Prices in USD per million tokens. What a line leaves out: cached and written input, audio and"
        )?;
        writeln!(
            out,
            "# images cost what `input` and `output` of that line cost; a tier without a line is standard."
        )?;
        writeln!(out, "unit = \"{UNIT}\"")?;
        writeln!(out, "source = {}", toml::Value::String(self.source.clone()))?;
        writeln!(out, "effective_from = {}", self.effective_from)?;
        writeln!(out, "confirmed_at = {}", self.confirmed_at)?;
        for (name, model) in &self.models {
            let name = toml::Value::String(name.clone());
            writeln!(out, "\n[models.{name}]")?;
            if let Some(date) = &model.effective_from {
                writeln!(out, "effective_from = {date}")?;
            }
            table(out, &model.table)?;
            if let Some((above, prices)) = &model.long_context {
                writeln!(out, "[models.{name}.long_context]\nabove_input_tokens = {above}")?;
                table(out, prices)?;
            }
        }
        Ok(())
    }
}

fn table(out: &mut impl Write, table: &PriceTable) -> fmt::Result {
    for (tier, line) in table.lines() {
        if tier == Tier::Standard {
            line.stated().try_for_each(|(key, price)| writeln!(out, "{key} = {}", decimal(price)))?;
        } else {
            writeln!(out, "{} = {{ {} }}", tier.as_str(), inline(line))?;
        }
    }
    Ok(())
}

fn inline(line: &Line) -> String {
    line.stated().map(|(key, price)| format!("{key} = {}", decimal(price))).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prices;

    #[test]
    fn a_price_prints_as_its_shortest_decimal() {
        for (text, printed) in
            [("0.15", "0.15"), ("2", "2.0"), ("0.0375", "0.0375"), ("0", "0.0"), ("0.000001", "0.000001")]
        {
            assert_eq!(decimal(TokenPrice::from_usd_per_million(text).unwrap()), printed);
        }
    }

    #[test]
    fn what_is_written_reads_back_the_same() {
        let file = prices::built_in_file();
        assert_eq!(prices::read(&file.to_string()).unwrap(), file);
    }
}
