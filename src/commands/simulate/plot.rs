//! The picture of a simulation: what the traffic was worth, what was held, what it all cost.

use std::path::Path;

use anyhow::bail;
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::element::DashedPathElement;
use plotters::prelude::*;

use crate::economics::Billing;
use crate::economics::NanoUsd;
use crate::simulator::engine::Outcome;

use super::Simulation;

const SIZE: (u32, u32) = (1200, 1200);

/// Points of a line at most; more would only make the file large.
const POINTS: usize = 1200;

/// Units of time and their seconds; the longest of which there are two is taken.
const UNITS: [(&str, f64); 3] = [("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0)];
const SECONDS: (&str, f64) = ("seconds", 1.0);

/// Colours that stay apart for the colour-blind (Okabe and Ito).
const API: RGBColor = RGBColor(0, 114, 178);
const SELF_HOSTED: RGBColor = RGBColor(0, 158, 115);
const ALL_SELF_HOSTED: RGBColor = RGBColor(0, 92, 67);
const BREAK_EVEN: RGBColor = RGBColor(213, 94, 0);
/// One for each policy that decides.
const POLICIES: [RGBColor; 4] =
    [RGBColor(230, 159, 0), RGBColor(204, 121, 167), RGBColor(86, 180, 233), RGBColor(90, 90, 90)];

/// Pixels of a dash and of the gap behind it.
const DASH: (i32, i32) = (7, 5);

/// Width of a line in the legend.
const SWATCH: i32 = 19;

/// Pixels of the legend: a line's name, and what is around them all.
const LEGEND_LINE: f64 = 15.5;
const LEGEND_FRAME: f64 = 24.0;
/// Pixels between the time axis and the top of a panel, without title and margins.
const PLOT_HEIGHT: f64 = 310.0;

type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

pub(super) fn draw(simulation: &Simulation, path: &Path) -> anyhow::Result<()> {
    if path.extension().is_none_or(|extension| !extension.eq_ignore_ascii_case("svg")) {
        bail!("pictures are SVG; give it the ending `.svg`");
    }
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let axis = axis(simulation);
    let panels = [volume(simulation, &axis), replicas(simulation, &axis), cost(simulation, &axis)];
    for (panel, area) in panels.iter().zip(root.split_evenly((panels.len(), 1))) {
        panel.draw(&axis, &area)?;
    }
    root.present()?;
    Ok(())
}

/// One of the pictures that stand above each other and share the time.
struct Panel {
    title: String,
    unit: &'static str,
    lines: Vec<Line>,
}

struct Line {
    name: String,
    points: Vec<(f64, f64)>,
    colour: RGBColor,
    shape: Shape,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    Solid,
    /// What no policy decided.
    Dashed,
    /// Filled down to zero.
    Area,
}

/// How the line of a policy looks: those that decide nothing are what the others are compared with.
fn look(index: usize, policy: &str) -> (RGBColor, Shape) {
    match policy {
        "api" => (API, Shape::Dashed),
        "fixed" => (SELF_HOSTED, Shape::Dashed),
        "self_hosted" => (ALL_SELF_HOSTED, Shape::Dashed),
        _ => (POLICIES[index % POLICIES.len()], Shape::Solid),
    }
}

/// The time from the start of the trace, and how many slots make a point.
struct Axis {
    /// What times are given in: days, or less for a short trace.
    unit: &'static str,
    length: f64,
    group: usize,
    /// Length of a slot in the unit.
    slot: f64,
}

fn axis(simulation: &Simulation) -> Axis {
    let slots = simulation.demand.slots.len();
    let seconds = count(slots) * simulation.demand.slot.as_secs_f64();
    let (unit, unit_seconds) = UNITS.into_iter().find(|(_, unit)| seconds >= 2.0 * unit).unwrap_or(SECONDS);
    Axis {
        unit,
        length: seconds / unit_seconds,
        group: slots.div_ceil(POINTS).max(1),
        slot: simulation.demand.slot.as_secs_f64() / unit_seconds,
    }
}

#[expect(clippy::cast_precision_loss, reason = "a place in a picture")]
fn count(number: usize) -> f64 {
    number as f64
}

/// A number without needless decimals: three digits that say something, or all of a larger one.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "what the chart calls")]
fn short(number: &f64) -> String {
    let places = if *number == 0.0 { 0.0 } else { (2.0 - number.abs().log10().floor()).clamp(3.0, 12.0) };
    let unit = 10.0_f64.powf(places);
    ((number * unit).round() / unit).to_string()
}

/// Means of groups of slots, at the middle of each group; of one group a line from end to end.
fn means(axis: &Axis, values: &[f64]) -> Vec<(f64, f64)> {
    if values.len() <= axis.group {
        let mean = values.iter().sum::<f64>() / count(values.len().max(1));
        return vec![(0.0, mean), (axis.length, mean)];
    }
    let middle = |index: usize, length: usize| (count(index * axis.group) + count(length) / 2.0) * axis.slot;
    values
        .chunks(axis.group)
        .enumerate()
        .map(|(index, group)| (middle(index, group.len()), group.iter().sum::<f64>() / count(group.len())))
        .collect()
}

fn volume(simulation: &Simulation, axis: &Axis) -> Panel {
    let hours = simulation.demand.slot.as_secs_f64() / 3600.0;
    let bills: Vec<f64> =
        simulation.demand.slots.iter().map(|slot| slot.api_cost.to_usd_f64() / hours).collect();
    let rent = simulation.pool.hourly.to_usd_f64();
    let bill = Line { name: "API bill".into(), points: means(axis, &bills), colour: API, shape: Shape::Area };
    let break_even = Line {
        name: format!("break-even: rent of one replica, {rent:.2} USD an hour"),
        points: vec![(0.0, rent), (axis.length, rent)],
        colour: BREAK_EVEN,
        shape: Shape::Dashed,
    };
    // Paid by use there is no rent to reach.
    let lines = if simulation.pool.billing == Billing::PerUse { vec![bill] } else { vec![bill, break_even] };
    Panel {
        title: format!("{}: what the traffic would cost on the API", simulation.trace),
        unit: "USD an hour",
        lines,
    }
}

fn replicas(simulation: &Simulation, axis: &Axis) -> Panel {
    let held = |outcome: &Outcome| -> Vec<(f64, f64)> {
        means(axis, &outcome.slots.iter().map(|slot| f64::from(slot.ready)).collect::<Vec<_>>())
    };
    let of_policy = |(index, outcome): (usize, &Outcome)| {
        let (colour, shape) = look(index, &outcome.name);
        outcome.slots.iter().any(|slot| slot.ready > 0).then(|| Line {
            name: outcome.name.clone(),
            points: held(outcome),
            colour,
            shape,
        })
    };
    let lines = simulation.outcomes.iter().enumerate().filter_map(of_policy).collect();
    Panel { title: "Replicas that served".into(), unit: "replicas", lines }
}

fn cost(simulation: &Simulation, axis: &Axis) -> Panel {
    let of_policy = |(index, outcome): (usize, &Outcome)| {
        let (colour, shape) = look(index, &outcome.name);
        let name = format!("{}: {:.2}", outcome.name, outcome.total());
        Line { name, points: cumulative(axis, outcome), colour, shape }
    };
    let mut lines: Vec<_> = simulation.outcomes.iter().enumerate().map(of_policy).collect();
    let optimum = &simulation.optimum;
    let name = if optimum.exact { "optimum in hindsight" } else { "lower bound" };
    lines.push(Line {
        name: format!("{name}, whole time: {:.2}", optimum.total),
        points: vec![(0.0, optimum.total.to_usd_f64()), (axis.length, optimum.total.to_usd_f64())],
        colour: BLACK,
        shape: Shape::Dashed,
    });
    Panel { title: "Cumulative cost, API bill and rent".into(), unit: "USD", lines }
}

impl Panel {
    fn draw(&self, axis: &Axis, area: &Area<'_>) -> Drawn {
        let mut chart = ChartBuilder::on(area)
            .caption(&self.title, ("sans-serif", 20))
            .margin(12)
            .x_label_area_size(36)
            .y_label_area_size(70)
            .build_cartesian_2d(0.0..axis.length, 0.0..self.top())?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .x_desc(axis.unit)
            .x_label_formatter(&short)
            .y_label_formatter(&short)
            .y_desc(self.unit)
            .draw()?;
        // A dashed line shows what is below it.
        let (above, below): (Vec<_>, Vec<_>) =
            self.lines.iter().partition(|line| line.shape == Shape::Dashed);
        for line in below.into_iter().chain(above) {
            line.draw(&mut chart)?;
        }
        // Of nothing it would be an empty box.
        if self.lines.is_empty() {
            return Ok(());
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.3))
            .draw()?;
        Ok(())
    }

    /// The top of the axis: the legend has its room above the highest value.
    fn top(&self) -> f64 {
        let highest =
            self.lines.iter().flat_map(|line| &line.points).map(|point| point.1).fold(0.0, f64::max);
        let legend = LEGEND_FRAME + LEGEND_LINE * count(self.lines.len());
        let top = highest / (1.0 - legend / PLOT_HEIGHT).max(0.2);
        if top > 0.0 { top } else { 1.0 }
    }
}

impl Line {
    fn draw<'a, 'b: 'a>(&self, chart: &mut Chart<'a, 'b>) -> Drawn {
        let (points, style) = (self.points.iter().copied(), self.colour.stroke_width(2));
        let drawn = match self.shape {
            Shape::Solid => chart.draw_series(LineSeries::new(points, style))?,
            Shape::Dashed => chart.draw_series(DashedLineSeries::new(points, DASH.0, DASH.1, style))?,
            Shape::Area => {
                chart.draw_series(AreaSeries::new(points, 0.0, self.colour.mix(0.25)).border_style(style))?
            }
        };
        drawn.label(&self.name);
        if self.shape == Shape::Dashed {
            drawn.legend(move |(x, y)| {
                DashedPathElement::new([(x, y), (x + SWATCH, y)], DASH.0, DASH.1, style)
            });
        } else {
            drawn.legend(move |(x, y)| PathElement::new([(x, y), (x + SWATCH, y)], style));
        }
        Ok(())
    }
}

/// What was spent up to the end of each group of slots.
fn cumulative(axis: &Axis, outcome: &Outcome) -> Vec<(f64, f64)> {
    let mut spent = NanoUsd::ZERO;
    let mut points = vec![(0.0, 0.0)];
    for (index, group) in outcome.slots.chunks(axis.group).enumerate() {
        spent += group.iter().map(|slot| slot.spent).sum();
        let end = count(index * axis.group + group.len()) * axis.slot;
        points.push((end, spent.to_usd_f64()));
    }
    points
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_number_is_not_nothing() {
        for (number, text) in [
            (0.0, "0"),
            (0.000_002_5, "0.0000025"),
            (0.1 + 0.2, "0.3"),
            (12.0, "12"),
            (1234.5678, "1234.568"),
        ] {
            assert_eq!(short(&number), text);
        }
    }

    #[test]
    fn one_slot_is_a_line_from_end_to_end() {
        let axis = Axis { unit: "seconds", length: 60.0, group: 1, slot: 60.0 };
        assert_eq!(means(&axis, &[3.0]), [(0.0, 3.0), (60.0, 3.0)]);
        assert_eq!(means(&axis, &[3.0, 5.0]), [(30.0, 3.0), (90.0, 5.0)]);
    }
}
