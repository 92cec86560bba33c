module github.com/cowdev/cowdev

go 1.25.0
