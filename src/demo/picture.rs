//! The demo as a picture: volume against break-even and who serves, and what it all costs.

use std::error::Error;
use std::ops::Range;
use std::time::Duration;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::economics::{NanoUsd, Preference};

/// What was true at one moment of the day.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// Since midnight.
    pub at: Duration,
    pub calls_per_hour: f64,
    /// Unknown until there is traffic to price.
    pub break_even_per_hour: Option<f64>,
    pub serves: Preference,
    /// Since midnight: what it cost, and what each backend alone would have cost.
    pub spent: NanoUsd,
    pub api_alone: NanoUsd,
    pub self_hosted_alone: NanoUsd,
}

const SIZE: (u32, u32) = (960, 560);
const INK: RGBColor = RGBColor(36, 41, 47);
const FAINT: RGBColor = RGBColor(208, 215, 222);
const API: RGBColor = RGBColor(9, 105, 218);
const SELF_HOSTED: RGBColor = RGBColor(26, 127, 55);
const FONT: &str = "Helvetica, Arial, sans-serif";
const DASH: (i32, i32) = (7, 5);
/// Unit of the time axis.
const UNIT: Duration = Duration::from_hours(3);

/// The picture as SVG. Fewer than two samples make an empty one.
pub fn svg(samples: &[Sample]) -> Result<String, Box<dyn Error + Send + Sync>> {
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        root.fill(&WHITE).map_err(|error| error.to_string())?;
        let (upper, lower) = root.split_vertically(SIZE.1 / 2 + 10);
        draw_volume(&upper, samples).map_err(|error| error.to_string())?;
        draw_cost(&lower, samples).map_err(|error| error.to_string())?;
        root.present().map_err(|error| error.to_string())?;
    }
    Ok(text)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;

/// Place on the time axis, whose unit is chosen so that round numbers are 00:00, 03:00, 06:00 and so on.
fn place(sample: &Sample) -> f64 {
    sample.at.as_secs_f64() / UNIT.as_secs_f64()
}

fn places(samples: &[Sample]) -> Range<f64> {
    0.0..samples.last().map_or(8.0, place).max(0.1)
}

fn draw_volume(area: &Area<'_>, samples: &[Sample]) -> Drawn {
    let most = samples.iter().map(|sample| sample.calls_per_hour).fold(1.0, f64::max) * 1.15;
    let mut chart = ChartBuilder::on(area)
        .caption("Calls an hour, and who serves them", style(17, INK))
        .margin(12)
        .margin_right(170)
        .x_label_area_size(26)
        .y_label_area_size(58)
        .build_cartesian_2d(places(samples), 0.0..most)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .bold_line_style(FAINT)
        .light_line_style(TRANSPARENT)
        .axis_style(FAINT)
        .label_style(style(13, INK))
        .x_labels(9)
        .x_label_formatter(&clock)
        .y_label_formatter(&|calls| format!("{calls:.0}"))
        .draw()?;
    for (serves, run) in runs(samples) {
        let colour = if serves == Preference::Api { API } else { SELF_HOSTED };
        let points = run.iter().map(|sample| (place(sample), sample.calls_per_hour));
        chart.draw_series(
            AreaSeries::new(points, 0.0, colour.mix(0.25)).border_style(colour.stroke_width(2)),
        )?;
    }
    let break_even: Vec<(f64, f64)> =
        samples.iter().filter_map(|sample| Some((place(sample), sample.break_even_per_hour?))).collect();
    let last = break_even.last().copied();
    chart.draw_series(DashedLineSeries::new(break_even, DASH.0, DASH.1, INK.stroke_width(2)))?;
    let end = places(samples).end;
    if let Some((_, level)) = last {
        chart.plotting_area().draw(&beside(end, level, &format!("break-even, {level:.0}"), INK))?;
    }
    for (position, name, colour) in [(0.97, "self-hosted serves", SELF_HOSTED), (0.87, "the API serves", API)]
    {
        chart.plotting_area().draw(&beside(end, most * position, name, colour))?;
    }
    Ok(())
}

fn draw_cost(area: &Area<'_>, samples: &[Sample]) -> Drawn {
    let last = samples.last();
    let amounts =
        last.map_or([NanoUsd::ZERO; 3], |last| [last.spent, last.api_alone, last.self_hosted_alone]);
    let most = amounts.iter().map(|amount| amount.to_usd_f64()).fold(0.01, f64::max) * 1.15;
    let mut chart = ChartBuilder::on(area)
        .caption("Dollars since midnight", style(17, INK))
        .margin(12)
        .margin_right(170)
        .x_label_area_size(26)
        .y_label_area_size(58)
        .build_cartesian_2d(places(samples), 0.0..most)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .bold_line_style(FAINT)
        .light_line_style(TRANSPARENT)
        .axis_style(FAINT)
        .label_style(style(13, INK))
        .x_labels(9)
        .y_labels(6)
        .x_label_formatter(&clock)
        .y_label_formatter(&|usd| format!("${usd:.0}"))
        .draw()?;
    let line = |amount: fn(&Sample) -> NanoUsd| {
        samples.iter().map(move |sample| (place(sample), amount(sample).to_usd_f64()))
    };
    let alone = [
        (API, (|sample| sample.api_alone) as fn(&Sample) -> NanoUsd),
        (SELF_HOSTED, |sample| sample.self_hosted_alone),
    ];
    for (colour, amount) in alone {
        chart.draw_series(DashedLineSeries::new(line(amount), DASH.0, DASH.1, colour.stroke_width(2)))?;
    }
    chart.draw_series(LineSeries::new(line(|sample| sample.spent), INK.stroke_width(3)))?;
    let end = places(samples).end;
    let names = ["breakeven", "API alone", "self-hosted alone"];
    let mut labels: Vec<(f64, String, RGBColor)> = std::iter::zip(amounts, names)
        .zip([INK, API, SELF_HOSTED])
        .map(|((amount, name), colour)| {
            (amount.to_usd_f64(), format!("{name}, ${:.2}", amount.to_usd_f64()), colour)
        })
        .collect();
    labels.sort_by(|one, other| one.0.total_cmp(&other.0));
    let mut lowest_free = f64::MIN;
    for (amount, text, colour) in labels {
        let level = amount.max(lowest_free);
        lowest_free = level + most * 0.085;
        chart.plotting_area().draw(&beside(end, level, &text, colour))?;
    }
    Ok(())
}

/// Stretches of the day with one preference; each ends where the next begins.
fn runs(samples: &[Sample]) -> Vec<(Preference, &[Sample])> {
    let mut runs = Vec::new();
    let mut start = 0;
    for index in 1..=samples.len() {
        if samples.get(index).is_none_or(|sample| sample.serves != samples[start].serves) {
            runs.push((samples[start].serves, &samples[start..(index + 1).min(samples.len())]));
            start = index;
        }
    }
    runs
}

/// A label at the right of the plot.
fn beside(x: f64, y: f64, text: &str, colour: RGBColor) -> Text<'static, (f64, f64), String> {
    Text::new(format!("\u{a0}{text}"), (x, y), style(14, colour).pos(Pos::new(HPos::Left, VPos::Center)))
}

fn style(size: u32, colour: RGBColor) -> TextStyle<'static> {
    (FONT, size).into_font().color(&colour)
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the shape of a label formatter")]
fn clock(place: &f64) -> String {
    let minutes = (place * UNIT.as_secs_f64() / 60.0).round();
    format!("{:02.0}:{:02.0}", (minutes / 60.0).floor(), minutes % 60.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(minute: u64, serves: Preference) -> Sample {
        let at = Duration::from_mins(minute);
        let spent = NanoUsd::from_nanos(i64::try_from(minute).unwrap() * 10_000_000);
        Sample {
            at,
            calls_per_hour: crate::demo::day::Day::at_speed(1_440).calls_per_hour(at),
            break_even_per_hour: (minute > 30).then_some(399.0),
            serves,
            spent,
            api_alone: spent + spent,
            self_hosted_alone: spent + spent + spent,
        }
    }

    #[test]
    fn a_picture_names_everything_that_it_shows() {
        let samples: Vec<Sample> = (0..144)
            .map(|step| {
                sample(
                    step * 10,
                    if (54..120).contains(&step) { Preference::SelfHosted } else { Preference::Api },
                )
            })
            .collect();
        let picture = svg(&samples).unwrap();
        for text in ["break-even, 399", "self-hosted serves", "the API serves", "breakeven, $14.30", "06:00"]
        {
            assert!(picture.contains(text), "{text}");
        }
    }

    #[test]
    fn a_demo_that_ends_at_once_still_makes_a_picture() {
        assert!(svg(&[]).unwrap().ends_with("</svg>\n"));
        assert!(svg(&[sample(0, Preference::Api)]).is_ok());
    }

    #[test]
    fn runs_touch_each_other() {
        let samples = [
            sample(0, Preference::Api),
            sample(1, Preference::SelfHosted),
            sample(2, Preference::SelfHosted),
        ];
        let lengths: Vec<usize> = runs(&samples).iter().map(|(_, run)| run.len()).collect();
        assert_eq!(lengths, [2, 2]);
        assert!(runs(&[]).is_empty());
    }
}
