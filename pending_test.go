package main

import (
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestOneOddAnswer: an answer that the source refuses takes no other with it.
func TestOneOddAnswer(t *testing.T) {
	for name, odd := range map[string]func(http.Header){
		"many fields": func(h http.Header) { h["X-Many"] = strings.Split(strings.Repeat("1,", 600), ",") },
		"large head":  func(h http.Header) { h["X-A"] = []string{strings.Repeat("v", 65300)} },
	} {
		t.Run(name, func(t *testing.T) {
			answer := func(r recorded) string {
				if !strings.Contains(r.line, "odd") {
					return says(201, "good")
				}
				h := http.Header{}
				odd(h)
				var lines []string
				for k, vs := range h {
					for _, v := range vs {
						lines = append(lines, k+": "+v)
					}
				}
				return says(202, "odd", lines...)
			}
			relayTest(t, answer, nil, func(t *testing.T, r *relay) {
				r.client()
				c := make(chan outcome, 20)
				for i := range 20 {
					path := "/good"
					if i%2 == 0 {
						path = "/odd"
					}
					go func() { c <- post(t.Context(), r.rt, "POST", hooksURL+path, "{}") }()
				}
				count := map[int]int{}
				for range 20 {
					count[(<-c).status]++
				}
				t.Log(count)
				if count[201] != 10 {
					t.Errorf("statuses %v", count)
				}
			})
		})
	}
}

// TestIdleClock: a stream that was idle for long compares clocks anew.
func TestIdleClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &clocks{began: time.Now()}
		name := newReplica()
		c.age(aged(name, 0, 0))
		time.Sleep(48 * time.Hour)
		for range 3 {
			if age := c.age(aged(name, 0, -8*time.Second)); age > time.Second { // 50 ppm
				t.Errorf("a fresh event is %v old", age)
			}
			time.Sleep(time.Second)
		}
	})
}
